"""The maths of slbo.py by hand or by a second method, its robots against the simulator, and its ledger."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from torch.func import functional_call

import slbo
from tests import pointmass
from tests.conftest import POINT, run
from tests.test_scripts import COMMANDS

TINY = slbo.Args(device="cpu", compile="off", hidden_sizes=(5,), value_hidden_sizes=(16,), model_hidden_sizes=(8,))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Linear(torch.nn.Module):
    """s' = s A + a B, where slbo.DeltaMLP is wanted, and a task."""

    members = 1

    def __init__(self, shift=0.0):
        super().__init__()
        self.a, self.b = torch.tensor([[0.9, 0.2], [-0.1, 0.8]]) + shift, torch.tensor([[0.5, -0.3]])
        self.normalise, self.normalise_delta = slbo.RunningNormaliser(2), slbo.RunningNormaliser(2)

    def forward(self, obs, actions):
        return obs @ self.a + actions @ self.b

    def reward(self, obs, actions, next_obs):
        return -next_obs.abs().sum(-1)

    def terminates(self, next_obs):
        return next_obs[..., 0] > 1.5


def random_steps(*shape: int) -> slbo.Steps:
    obs, next_obs, ends = torch.randn(*shape, 2), torch.randn(*shape, 2), torch.zeros(2, *shape)
    return slbo.Steps(obs, torch.randn(*shape, 1), torch.randn(shape), next_obs, *ends)


# ------------------------------------------------------------------------------------------------------ model
def test_an_untrained_model_predicts_the_mean_change_within_reach_of_numpys_statistics_of_all_data():
    dynamics, data = slbo.DeltaMLP(2, 1, TINY), random_steps(408)
    data = data._replace(obs=data.obs * (1 + torch.arange(408)[:, None] // 200) + 3)
    for part in zip(*(x.split([7, 1, 400]) for x in (data.obs, data.next_obs)), strict=True):
        dynamics.normalise.update(part[0])
        dynamics.normalise_delta.update(part[1] - part[0])
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0)
    torch.testing.assert_close(dynamics.normalise(data.obs), (data.obs - mean) / std)
    expected = data.obs + (data.next_obs - data.obs).mean(0)
    torch.testing.assert_close(dynamics(data.obs[None], data.actions[None])[0], expected, atol=1e-4, rtol=0)
    far = dynamics(torch.full((1, 1, 2), 1e6), torch.zeros(1, 1, 1))[0, 0]
    torch.testing.assert_close(far, mean + 100 * std)
    dynamics.net.weights[-1].data.fill_(1)
    beyond, bound = (dynamics(data.obs[None], torch.full((1, 408, 1), action)) for action in (7.0, 1.0))
    assert torch.equal(beyond, bound)  # actions are cut


@pytest.mark.parametrize("loss", ["l2", "mse"])
@pytest.mark.parametrize("target", ["delta", "state"])
def test_the_loss_follows_predicted_paths_and_starts_anew_after_an_end(loss, target):
    """By hand, row by row: the second stretch ends after its first step, the third after its second."""
    args, model, steps = replace(TINY, horizon=3, loss=loss, model_target=target), Linear(), random_steps(1, 3, 3)
    model.normalise_delta.std.copy_(torch.tensor([0.5, 2.0]))
    steps.terminations[0, 1, 0] = steps.truncations[0, 2, 1] = 1
    total, paths = 0.0, steps.next_obs.clone()
    for row in range(3):
        state = steps.obs[0, row, 0]
        for i in range(3):
            paths[0, row, i] = predicted = model(state, steps.actions[0, row, i])
            error = predicted - steps.next_obs[0, row, i]
            if target == "delta":
                error = error - (state - steps.obs[0, row, i])
            square = float((error / model.normalise_delta.std).square().mean())
            total += (math.sqrt(square) if loss == "l2" else square) / 9
            state = steps.obs[0, row, i + 1] if (row, i) in ((1, 0), (2, 1)) else predicted
    assert float(slbo.model_loss(model, steps, args)) == pytest.approx(total, rel=1e-5)
    model.a.requires_grad_()  # a perfect model has no loss and a finite gradient
    perfect = slbo.model_loss(model, steps._replace(next_obs=paths), replace(args, model_target="state"))
    assert perfect < 1e-5 and torch.autograd.grad(perfect, model.a)[0].isfinite().all()


def test_a_model_update_is_adam_on_a_cut_gradient_with_decay_inside():
    args = replace(TINY, model_weight_decay=0.1, model_max_grad_norm=0.5)
    dynamics, steps = slbo.DeltaMLP(2, 1, args), random_steps(1, 6, 2)
    for param in dynamics.parameters():
        torch.nn.init.normal_(param)
    other = copy.deepcopy(dynamics)
    params = list(other.parameters())
    optimizer = torch.optim.Adam(params, args.model_lr)
    for _ in range(3):
        optimizer.zero_grad()
        (slbo.model_loss(other, steps, args) + 0.05 * sum(p.square().sum() for p in params)).backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        slbo.dynamics_step(dynamics, steps, args)
    torch.testing.assert_close(list(dynamics.parameters()), params, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dynamics.optimizer.mean, [optimizer.state[p]["exp_avg"] for p in params])


def test_stretches_are_consecutive_rows_and_every_start_is_as_likely():
    data = slbo.Steps(*(torch.arange(10.0)[:, None] if i in (0, 1, 3) else torch.arange(10.0) for i in range(6)))
    found = slbo.stretches(data, 2, 20_000, 3).rewards
    assert found.shape == (2, 20_000, 3)
    assert torch.equal(found[..., 1:], (found[..., :1] + torch.tensor([1.0, 2.0])) % 10)
    assert (torch.bincount(found[..., 0].flatten().long()) - 4_000).abs().max() < 300


# ------------------------------------------------------------------------------------------- virtual environments
def test_virtual_steps_are_the_true_dynamics_when_the_model_is_the_truth():
    args, truth = replace(TINY, virtual_steps=12, virtual_envs=3, gamma=0.9), Linear()
    actor, starts = slbo.Actor(2, 1, (5,)), torch.tensor([[1.0, -1.0], [1.4, 0.5], [0.0, 1.0], [2.0, 0.3]])
    steps = slbo.virtual_rollout(slbo.virtual_step, actor, truth, truth, starts, args)
    states, reset = steps.obs[0], torch.ones(3, dtype=torch.bool)
    for t in range(12):
        again = (steps.obs[t][:, None] == starts).all(-1).any(-1)
        assert again[reset].all() and torch.equal(steps.obs[t][~reset], states[~reset])
        states = steps.next_obs[t]
        torch.testing.assert_close(states, truth(steps.obs[t], steps.actions[t]))
        torch.testing.assert_close(steps.rewards[t], -states.abs().sum(-1))
        reset = states[:, 0] > 1.5
        assert torch.equal(steps.terminations[t].bool(), reset) and (steps.truncations[t] == (t == 11)).all()
    assert steps.terminations.sum() > 0

    totals = torch.zeros(len(starts))  # of the policy without noise
    for i, state in enumerate(starts):
        for t in range(12):
            state = truth(state, actor(state[None])[0][0].detach())
            totals[i] -= 0.9**t * state.abs().sum()
            if state[0] > 1.5:
                break
    value = slbo.virtual_value(actor, truth, truth, starts, 12, 0.9)
    assert float(value) == pytest.approx(float(totals.mean()), rel=1e-5)


def test_optimism_pays_for_disagreement():
    args = replace(TINY, optimism=2.0, virtual_steps=3, virtual_envs=4)
    dynamics, actor = slbo.DeltaMLP(2, 1, args), slbo.Actor(2, 1, (5,))
    torch.nn.init.normal_(dynamics.net.weights[-1])
    steps = slbo.virtual_rollout(slbo.virtual_step, actor, dynamics, Linear(), torch.zeros(1, 2), args)
    both = dynamics(steps.obs[0].expand(2, -1, -1), steps.actions[0].expand(2, -1, -1))
    bonus = 2 * (both[0] - both[1]).square().mean(-1).sqrt()
    torch.testing.assert_close(steps.rewards[0], bonus - steps.next_obs[0].abs().sum(-1))
    torch.testing.assert_close(steps.next_obs[0], both[0])
    assert bonus.min() > 0


def test_the_bound_is_above_the_gap_and_the_telescope_is_exact_on_a_linear_system():
    """V^{pi,M} is linear here: V(s) = s . v, whose slope is L exactly. Rewards are linear, the policy does nothing."""
    truth, model, gamma, length = Linear(), Linear(torch.tensor([[0.02, -0.05], [0.03, 0.01]])), 0.9, 400
    weights = torch.tensor([1.0, -2.0])
    slope = torch.linalg.solve(torch.eye(2) - gamma * model.a, model.a @ weights)  # V(s) = s' weights + gamma V(s')
    worth = weights + gamma * slope  # of s'
    value = torch.nn.Module()
    value.normalise, value.forward = slbo.RunningNormaliser(2), lambda obs: obs @ slope
    truth.reward = lambda obs, actions, next_obs: next_obs @ weights
    states = [torch.tensor([[1.0, 0.5]])]
    for _ in range(length):
        states.append(states[-1] @ truth.a)
    obs, next_obs, times = torch.cat(states[:-1]), torch.cat(states[1:]), torch.arange(length)
    steps = random_steps(length)._replace(obs=obs, actions=torch.zeros(length, 1), next_obs=next_obs)
    gap = obs[0] @ slope - (gamma**times * (next_obs @ weights)).sum()
    errors = obs @ model.a - next_obs
    assert float(gap) == pytest.approx(float((gamma**times * (errors @ worth)).sum()), abs=1e-5)
    found = slbo.discrepancy(value, model, truth, steps, times, gamma)
    assert float(found["model/lipschitz"]) == pytest.approx(float(worth.norm()))
    bound = worth.norm() * (gamma**times * errors.norm(dim=-1)).sum()
    assert 0 < abs(gap) <= found["model/bound"] and float(found["model/bound"]) == pytest.approx(float(bound), rel=1e-5)
    assert slbo.discrepancy(value, truth, truth, steps, times, gamma)["model/bound"] < 1e-6  # R2


# ------------------------------------------------------------------------------------------------------- TRPO
def test_advantages_are_the_sums_written_out_with_terminations_and_time_limits_apart():
    args, steps = replace(TINY, gamma=0.9, gae_lambda=0.8), random_steps(9, 2)
    steps.terminations[3, 0] = steps.truncations[5, 1] = steps.truncations[8] = 1
    values, next_values = torch.randn(2, 9, 2)
    found = slbo.generalised_advantages(steps, values, next_values, args)
    for t, env in itertools.product(range(9), range(2)):
        total, weight = 0.0, 1.0
        for k in range(t, 9):
            later = 0.0 if steps.terminations[k, env] else 0.9 * next_values[k, env]
            total += weight * (steps.rewards[k, env] + later - values[k, env])
            weight *= 0.9 * 0.8
            if steps.terminations[k, env] or steps.truncations[k, env]:
                break
        assert float(found[t, env]) == pytest.approx(float(total), abs=1e-5)


def test_the_limited_entropy_is_the_pages_number_and_the_exact_one_the_integral():
    zero = torch.zeros(1)
    assert float(slbo.limited_entropy(zero, zero, exact=False)) == pytest.approx(1.0685, abs=1e-4)
    a = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    for mean, std in ((0.0, 1.0), (0.7, 0.3), (-1.8, 1.5), (3.0, 2.0)):
        log_p = torch.distributions.Normal(mean, std).log_prob(a)
        integral = torch.trapezoid(-log_p.exp() * log_p, a)
        ours = slbo.limited_entropy(torch.tensor(mean).double(), torch.tensor(std).double().log(), exact=True)
        assert float(ours) == pytest.approx(float(integral), abs=1e-6)


def test_a_trpo_step_is_the_natural_gradient_of_size_max_kl_and_is_taken_back_where_it_does_not_help():
    """With the Hessian of the divergence, from autograd, and torch's solver."""
    args, actor = replace(TINY, damping=1e-3, max_kl=1e-6), slbo.Actor(3, 2, (5,)).double()
    obs = torch.randn(40, 3).double()
    actor.normalise.update(obs + 1)
    actor.net.weights[-1].data *= 50
    actor.log_std.data = torch.tensor([-0.5, 0.3]).double()
    params = {name: p.detach().clone() for name, p in actor.named_parameters()}
    old = [x.detach().clone() for x in actor(obs)]
    flat, new = slbo.flat(params.values()), [old[0] + 0.3, old[1] - 0.2]
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new)]
    torch.testing.assert_close(slbo.mean_kl(old, new), torch.distributions.kl_divergence(*normals).sum(-1).mean())

    def divergence(vector):
        return slbo.mean_kl(old, functional_call(actor, slbo.shaped(vector, params), (obs,)))

    fisher = torch.autograd.functional.hessian(divergence, flat) + 1e-3 * torch.eye(len(flat))
    products = [slbo.fisher_product(actor, obs, v, args) for v in torch.eye(len(flat)).double()]
    torch.testing.assert_close(torch.stack(products), fisher, rtol=1e-6, atol=1e-8)
    actions, advantages = old[0] + old[1].exp() * torch.randn(40, 2).double(), torch.randn(40).double()
    log_probs = torch.distributions.Normal(actor(obs)[0], actor.log_std.exp()).log_prob(actions).sum(-1)
    entropy = slbo.limited_entropy(*actor(obs), exact=False).sum(-1)
    gain = (log_probs * advantages + 0.7 * entropy).mean()  # its gradient, where the ratio is 1
    gradient = slbo.flat(torch.autograd.grad(gain, list(actor.parameters())))
    found = slbo.conjugate_gradient(lambda v: fisher @ v, gradient, 99)
    torch.testing.assert_close(fisher @ found, gradient, rtol=0, atol=2e-5)
    assert not slbo.conjugate_gradient(lambda v: fisher @ v, 0 * gradient, 10).any()

    inputs = obs, actions, advantages, 0.7, replace(args, cg_iterations=60)
    wrong = slbo.trpo_update(actor, lambda *x: -slbo.fisher_product(*x), *inputs)
    assert wrong["losses/step_share"] == 0 and wrong["losses/gain"] == 0
    assert torch.equal(slbo.flat(actor.parameters()), flat)
    metrics = slbo.trpo_update(actor, slbo.fisher_product, *inputs)
    step = slbo.flat(actor.parameters()).detach() - flat
    assert float(torch.cosine_similarity(step, torch.linalg.solve(fisher, gradient), 0)) == pytest.approx(1, abs=1e-4)
    assert float(step @ fisher @ step / 2) == pytest.approx(1e-6, rel=1e-3) and metrics["losses/step_share"] == 1
    assert float(metrics["losses/kl"]) == pytest.approx(float(divergence(flat + step)), rel=1e-6)
    assert float(metrics["losses/gain"]) == pytest.approx(float(gradient @ step), rel=0.05)


# ----------------------------------------------------------------------------------------------- environments
ROBOTS = {  # size of an observation, price of effort, bonus, where it goes on
    "HalfCheetah": (24, 0.05, 0, lambda q, v: True),
    "Swimmer": (16, 0.005, 0, lambda q, v: True),
    "Ant": (44, 0.005, 0.05, lambda q, v: 0.2 <= q[2] <= 1),
    "Humanoid": (53, 5e-4, 0.2, lambda q, v: 0.8 <= q[2] <= 2),
    "Walker2d": (24, 0.001, 1, lambda q, v: 0.8 < q[1] < 2 and abs(q[2]) < 1),
    "Hopper": (18, 0.005, 1, lambda q, v: q[1] > 0.7 and abs(q[2]) < 0.2 and (np.abs([*q[3:], *v]) < 100).all()),
}


@pytest.mark.parametrize("robot", ROBOTS)
def test_a_robots_reward_and_end_are_those_of_the_simulators_own_centre_of_mass(robot):
    dim, price, bonus, goes_on = ROBOTS[robot]
    env = slbo.make_env(f"SLBO{robot}-v0")
    task, rng, (obs, _) = slbo.KnownTask(env, "cpu"), np.random.default_rng(0), env.reset(seed=0)
    assert obs.shape == (dim,) and env.spec.max_episode_steps == 200
    assert gym.spec(f"SLBO{robot}Long-v0").max_episode_steps == 500
    model, other = env.unwrapped.model, mujoco.MjData(env.unwrapped.model)
    for t in range(400):
        action = rng.uniform(-1.3, 1.3, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        other.qpos[:], other.qvel[:] = env.unwrapped.data.qpos, env.unwrapped.data.qvel
        mujoco.mj_forward(model, other)
        mujoco.mj_subtreeVel(model, other)
        velocity = other.body("torso").subtree_linvel
        np.testing.assert_allclose(next_obs[-3:], velocity, atol=1e-5)
        expected = velocity[0] + bonus - price * (action.clip(-1, 1) ** 2).sum()  # actions as shares of their greatest
        expected -= 5e-3 * (velocity[1:] ** 2).sum() if robot == "Humanoid" else 0
        assert reward == pytest.approx(expected, abs=1e-5)
        assert terminated == (not goes_on(other.qpos, other.qvel))
        tensors = [torch.tensor(x)[None] for x in (obs, action, next_obs)]
        assert float(task.reward(*tensors)) == pytest.approx(reward, abs=1e-4)
        assert task.terminates(tensors[2]).tolist() == [terminated]
        obs = env.reset(seed=t)[0] if terminated or truncated else next_obs


@pytest.mark.parametrize(
    "name,function,message",
    [
        ("reward", lambda self, obs, actions, next_obs: 1.001 - next_obs[..., :2].norm(dim=-1), "reward is wrong by"),
        ("terminates", lambda self, next_obs: next_obs[..., 0].abs() > 2, r"terminates \d+ times"),
        ("terminates", None, "has no reward"),
    ],
)
def test_functions_that_are_not_the_environments_stop_the_run(name, function, message, monkeypatch, tmp_path):
    monkeypatch.delattr(pointmass.PointMass, name)
    if function:
        monkeypatch.setattr(pointmass.PointMass, name, function, raising=False)
    with pytest.raises(SystemExit, match=rf"^slbo\.py: .*{message}"):
        run("slbo", f"{COMMANDS['slbo']} --env-id {POINT}", tmp_path)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- runs
def train(folder, **settings) -> list[dict]:
    small = dict(env_id=POINT, total_timesteps=180, stage_steps=60, eval_every=60, eval_episodes=1, rounds=2)
    small |= dict(model_updates=3, policy_updates=2, virtual_envs=4, virtual_steps=10, value_epochs=1)
    return slbo.train(replace(TINY, **small | settings, run_dir=str(folder / "run")))


def test_noise_lasts_and_reaches_the_stationary_spread(monkeypatch, tmp_path):
    """Of n <- 0.85 n + 0.3 N(0, 1): variance 0.3^2 / (1 - 0.85^2), neighbours correlate by 0.85."""
    monkeypatch.setattr(slbo.Actor, "sample", lambda self, obs, noise: torch.zeros(1, 2))
    taken, step = [], pointmass.PointMass.step
    monkeypatch.setattr(pointmass.PointMass, "step", lambda self, a: taken.append(a[0] / 2) or step(self, a))
    train(tmp_path, total_timesteps=3_000, eval_every=3_000, stage_steps=10_000, ou_sigma=0.1)
    noise = np.array(taken[-3_100:-100])  # between the evaluations, two of one episode each
    assert noise.std() == pytest.approx(0.1 / math.sqrt(1 - 0.85**2), rel=0.15)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(0.85, abs=0.04)


@pytest.mark.parametrize("algo,order", [("slbo", "dddvpvp" * 2), ("mb-trpo", "d" * 6 + "vp" * 4), ("mf-trpo", "p")])
def test_the_ledger(algo, order, monkeypatch, tmp_path):
    """Real steps are the training environment's; SLBO and MB-TRPO take the same numbers of updates."""
    envs, make_env, calls, normalised = [], slbo.make_env, [], set()

    def counted_env(env_id):
        envs.append(make_env(env_id))
        envs[-1].step = Mock(wraps=envs[-1].step)
        return envs[-1]

    def noted(name, function, *inputs):
        calls.append(name[0])
        if name == "policy_update":  # steps that the policy's normaliser has seen
            normalised.add(int(inputs[0].normalise.count))
        return function(*inputs)

    monkeypatch.setattr(slbo, "make_env", counted_env)
    for name in ("dynamics_step", "virtual_rollout", "policy_update"):
        monkeypatch.setattr(slbo, name, partial(noted, name, getattr(slbo, name)))
    rows = train(tmp_path, algo=algo)
    assert [row["env_steps"] for row in rows] == [0, 60, 120, 180] and envs[0].step.call_count == 180
    assert "".join(calls) == order * 3
    assert normalised == ({0, 60, 120} if algo == "mf-trpo" else {60, 120, 180})  # mf-trpo's is of who acted
