"""The maths of slbo.py by hand or by a second method, its robots against the simulator, and its ledger."""

import importlib
import math
import sys
from dataclasses import replace
from functools import partial

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
    """s' = s A + a B, where slbo.DeltaMLP is wanted."""

    members = 1

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.a, self.b = a, b
        self.normalise, self.normalise_delta = slbo.RunningNormaliser(len(a)), slbo.RunningNormaliser(len(a))

    def forward(self, obs, actions):
        return obs @ self.a + actions @ self.b


class LinearTask:
    def reward(self, obs, actions, next_obs):
        return -next_obs.abs().sum(-1)

    def terminates(self, next_obs):
        return next_obs[..., 0] > 1.5


def linear() -> Linear:
    return Linear(torch.tensor([[0.9, 0.2], [-0.1, 0.8]]), torch.tensor([[0.5, -0.3]]))


def random_steps(*shape: int, obs_dim: int = 2, act_dim: int = 1) -> slbo.Steps:
    obs, next_obs = torch.randn(*shape, obs_dim), torch.randn(*shape, obs_dim)
    ends = torch.zeros(2, *shape)
    return slbo.Steps(obs, torch.randn(*shape, act_dim), torch.randn(shape), next_obs, *ends)


# ------------------------------------------------------------------------------------------------------ model
def test_the_running_normaliser_is_numpys_over_everything():
    normalise, rng = slbo.RunningNormaliser(3), np.random.default_rng(0)
    parts = [rng.normal(i, 1 + i, (n, 3)) for i, n in enumerate((7, 1, 400))]
    torch.testing.assert_close(normalise(torch.ones(3)), torch.ones(3))
    for part in parts:
        normalise.update(torch.tensor(part, dtype=torch.float32))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(normalise.mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(normalise.std, whole.std(0), rtol=1e-5)
    assert normalise.count == 408


def test_an_untrained_model_predicts_the_mean_change_within_reach():
    dynamics, data = slbo.DeltaMLP(2, 1, TINY), random_steps(50)
    dynamics.normalise.update(data.obs)
    dynamics.normalise_delta.update(data.next_obs - data.obs)
    expected = data.obs + (data.next_obs - data.obs).mean(0)
    torch.testing.assert_close(dynamics(data.obs[None], data.actions[None])[0], expected, atol=1e-4, rtol=0)
    far = dynamics(torch.full((1, 1, 2), 1e6), torch.zeros(1, 1, 1))[0, 0]
    torch.testing.assert_close(far, dynamics.normalise.mean + 100 * dynamics.normalise.std)
    assert torch.equal(
        dynamics(data.obs[None], torch.full((1, 50, 1), 7.0)), dynamics(data.obs[None], torch.ones(1, 50, 1))
    )


@pytest.mark.parametrize("loss", ["l2", "mse"])
@pytest.mark.parametrize("target", ["delta", "state"])
def test_the_loss_follows_predicted_paths_and_starts_anew_after_an_end(loss, target):
    """By hand, row by row: the second stretch ends after its first step, the third after its second."""
    args, model, steps = replace(TINY, horizon=3, loss=loss, model_target=target), linear(), random_steps(1, 3, 3)
    model.normalise_delta.std.copy_(torch.tensor([0.5, 2.0]))
    steps.terminations[0, 1, 0] = steps.truncations[0, 2, 1] = 1
    total = 0.0
    for row in range(3):
        state = steps.obs[0, row, 0]
        for i in range(3):
            predicted = state @ model.a + steps.actions[0, row, i] @ model.b
            error = predicted - steps.next_obs[0, row, i]
            if target == "delta":
                error = error - (state - steps.obs[0, row, i])
            square = float((error / model.normalise_delta.std).square().mean())
            total += (math.sqrt(square) if loss == "l2" else square) / 9
            state = steps.obs[0, row, i + 1] if (row, i) in ((1, 0), (2, 1)) else predicted
    assert float(slbo.model_loss(model, steps, args)) == pytest.approx(total, rel=1e-5)


def test_a_perfect_model_has_no_loss_and_a_finite_gradient():
    model, obs = linear(), torch.randn(1, 4, 2)
    model.a.requires_grad_()
    rows = []
    for _ in range(4):
        actions = torch.randn(1, 4, 1)
        rows.append(
            (obs, actions, torch.zeros(1, 4), model(obs, actions).detach(), torch.zeros(1, 4), torch.zeros(1, 4))
        )
        obs = rows[-1][3]
    steps = slbo.Steps(*(torch.stack(x, 2) for x in zip(*rows, strict=True)))
    loss = slbo.model_loss(model, steps, replace(TINY, horizon=4))
    loss.backward()
    assert loss.item() < 1e-5 and model.a.grad.isfinite().all()


def test_a_model_update_is_adam_on_a_cut_gradient_with_decay_inside():
    args = replace(TINY, model_weight_decay=0.1, model_max_grad_norm=0.5)
    dynamics, steps = slbo.DeltaMLP(2, 1, args), random_steps(1, 6, 2)
    for param in dynamics.parameters():
        torch.nn.init.normal_(param)
    params = [param.detach().clone().requires_grad_() for param in dynamics.parameters()]
    names = [name for name, _ in dynamics.named_parameters()]
    optimizer = torch.optim.Adam(params, args.model_lr)
    for _ in range(3):
        wrapped = lambda *x: functional_call(dynamics, dict(zip(names, params, strict=True)), x)  # noqa: E731
        wrapped.normalise_delta = dynamics.normalise_delta
        optimizer.zero_grad()
        (slbo.model_loss(wrapped, steps, args) + 0.05 * sum(p.square().sum() for p in params)).backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        slbo.dynamics_step(dynamics, steps, args)
        optimizer.step()
    torch.testing.assert_close(list(dynamics.parameters()), params, rtol=1e-4, atol=1e-5)


def test_stretches_are_consecutive_rows_and_every_start_is_as_likely():
    data = slbo.Steps(*(torch.arange(10.0)[:, None] if i in (0, 1, 3) else torch.arange(10.0) for i in range(6)))
    found = slbo.stretches(data, 2, 20_000, 3).rewards
    assert found.shape == (2, 20_000, 3)
    assert torch.equal(found[..., 1:], (found[..., :1] + torch.tensor([1.0, 2.0])) % 10)
    assert (torch.bincount(found[..., 0].flatten().long()) - 4_000).abs().max() < 300


# ------------------------------------------------------------------------------------------- virtual environments
def test_virtual_steps_are_the_true_dynamics_when_the_model_is_the_truth():
    args, truth, task = replace(TINY, virtual_steps=12, virtual_envs=3, gamma=0.9), linear(), LinearTask()
    actor, starts = slbo.Actor(2, 1, (5,)), torch.tensor([[1.0, -1.0], [1.4, 0.5], [0.0, 1.0], [0.3, 0.3]])
    steps = slbo.virtual_rollout(slbo.virtual_step, actor, truth, task, starts, args)
    states, reset = steps.obs[0].clone(), torch.zeros(3, dtype=torch.bool)
    for t in range(12):
        again = (steps.obs[t][:, None] == starts).all(-1).any(-1)
        assert again[reset].all() and torch.equal(steps.obs[t][~reset], states[~reset])
        states = steps.obs[t] @ truth.a + steps.actions[t] @ truth.b
        torch.testing.assert_close(steps.next_obs[t], states)
        states, reset = steps.next_obs[t], states[:, 0] > 1.5
        assert torch.equal(steps.terminations[t].bool(), reset)
        torch.testing.assert_close(steps.rewards[t], -states.abs().sum(-1))
    assert steps.terminations.sum() > 0 and torch.equal(steps.truncations.sum(0), torch.ones(3))

    state, total, discount = starts[:1].clone(), 0.0, 1.0  # the policy without noise
    for _ in range(12):
        state = state @ truth.a + actor(state)[0] @ truth.b
        total, discount = total - discount * float(state.detach().abs().sum()), discount * 0.9
        if state[0, 0] > 1.5:
            break
    value = slbo.virtual_value(actor, truth, task, starts[:1], 12, 0.9)
    assert float(value) == pytest.approx(total, rel=1e-5)


def test_optimism_pays_for_disagreement():
    args = replace(TINY, optimism=2.0, virtual_steps=3, virtual_envs=4)
    dynamics, actor = slbo.DeltaMLP(2, 1, args), slbo.Actor(2, 1, (5,))
    for param in dynamics.parameters():
        torch.nn.init.normal_(param)
    steps = slbo.virtual_rollout(slbo.virtual_step, actor, dynamics, LinearTask(), torch.zeros(1, 2), args)
    both = dynamics(steps.obs[0].expand(2, -1, -1), steps.actions[0].expand(2, -1, -1))
    bonus = 2 * (both[0] - both[1]).square().mean(-1).sqrt()
    torch.testing.assert_close(steps.rewards[0], bonus - steps.next_obs[0].abs().sum(-1))
    torch.testing.assert_close(steps.next_obs[0], both[0])
    assert bonus.min() > 0


def test_the_bound_is_above_the_gap_and_the_telescope_is_exact_on_a_linear_system():
    """V^{pi,M} is linear here: V(s) = s . v, whose slope is L exactly. Rewards are linear, the policy does nothing."""
    truth, gamma, length = linear(), 0.9, 400
    model = Linear(truth.a + torch.tensor([[0.02, -0.05], [0.03, 0.01]]), truth.b)
    weights = torch.tensor([1.0, -2.0])
    slope = torch.linalg.solve(torch.eye(2) - gamma * model.a, model.a @ weights)  # V(s) = s' weights + gamma V(s')
    worth = weights + gamma * slope  # of s'
    value, task = torch.nn.Module(), LinearTask()
    value.normalise, value.forward = slbo.RunningNormaliser(2), lambda obs: obs @ slope
    task.reward = lambda obs, actions, next_obs: next_obs @ weights
    states = [torch.tensor([[1.0, 0.5]])]
    for _ in range(length):
        states.append(states[-1] @ truth.a)
    obs, next_obs = torch.cat(states[:-1]), torch.cat(states[1:])
    zeros, times = torch.zeros(length), torch.arange(length)
    steps = slbo.Steps(obs, torch.zeros(length, 1), next_obs @ weights, next_obs, zeros, zeros)
    gap = (states[0] @ slope).sum() - (gamma**times * steps.rewards).sum()
    errors = obs @ model.a - next_obs
    telescope = (gamma**times * (errors @ worth)).sum()
    assert float(gap) == pytest.approx(float(telescope), abs=1e-5)
    found = slbo.discrepancy(value, model, task, steps, times, gamma)
    assert float(found["model/lipschitz"]) == pytest.approx(float(worth.norm()))
    bound = worth.norm() * (gamma**times * errors.norm(dim=-1)).sum()
    assert 0 < abs(gap) <= found["model/bound"] and float(found["model/bound"]) == pytest.approx(float(bound), rel=1e-5)
    assert slbo.discrepancy(value, truth, task, steps, times, gamma)["model/bound"] < 1e-6  # R2


# ------------------------------------------------------------------------------------------------------- TRPO
def test_advantages_are_the_sums_written_out_with_terminations_and_time_limits_apart():
    args, (length, envs) = replace(TINY, gamma=0.9, gae_lambda=0.8), (9, 2)
    steps = random_steps(length, envs)
    steps.terminations[3, 0] = steps.truncations[5, 1] = steps.truncations[8] = 1
    values, next_values = torch.randn(length, envs), torch.randn(length, envs)
    found = slbo.generalised_advantages(steps, values, next_values, args)
    for env in range(envs):
        for t in range(length):
            total, weight = 0.0, 1.0
            for k in range(t, length):
                later = 0.0 if steps.terminations[k, env] else 0.9 * next_values[k, env]
                total += weight * (steps.rewards[k, env] + later - values[k, env])
                weight *= 0.9 * 0.8
                if steps.terminations[k, env] or steps.truncations[k, env]:
                    break
            assert float(found[t, env]) == pytest.approx(float(total), abs=1e-5)


def test_the_limited_entropy_is_the_pages_number_and_the_exact_one_the_integral():
    zero = torch.zeros(1)
    assert float(slbo.limited_entropy(zero, zero, exact=False)) == pytest.approx(1.0685, abs=1e-4)
    assert float(slbo.limited_entropy(zero, zero, exact=True)) == pytest.approx(1.2464, abs=1e-4)
    a = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    for mean, std in ((0.0, 1.0), (0.7, 0.3), (-1.8, 1.5), (3.0, 2.0)):
        log_p = torch.distributions.Normal(mean, std).log_prob(a.clone())
        integral = torch.trapezoid(-log_p.exp() * log_p, a)
        ours = slbo.limited_entropy(torch.tensor(mean).double(), torch.tensor(std).double().log(), exact=True)
        assert float(ours) == pytest.approx(float(integral), abs=1e-6)


def actor_and_obs() -> tuple[slbo.Actor, torch.Tensor]:
    actor, obs = slbo.Actor(3, 2, (5,)).double(), torch.randn(40, 3).double()
    actor.normalise.update(obs + 1)
    actor.net.weights[-1].data *= 50
    actor.log_std.data = torch.tensor([-0.5, 0.3]).double()
    return actor, obs


def test_the_fisher_product_is_the_hessian_of_the_divergence():
    actor, obs = actor_and_obs()
    params = {name: param.detach() for name, param in actor.named_parameters()}
    old = [x.detach() for x in actor(obs)]

    def divergence(vector):
        return slbo.mean_kl(old, functional_call(actor, slbo.shaped(vector, params), (obs,)))

    flat = slbo.flat(params.values())
    hessian = torch.autograd.functional.hessian(divergence, flat)
    new = [old[0] + 0.3, old[1] - 0.2]
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new)]
    torch.testing.assert_close(slbo.mean_kl(old, new), torch.distributions.kl_divergence(*normals).sum(-1).mean())
    for _ in range(3):
        v = torch.randn_like(flat)
        ours = slbo.fisher_product(actor, obs, v, replace(TINY, damping=0.3))
        torch.testing.assert_close(ours, hessian @ v + 0.3 * v, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_solve_the_system():
    root, target = torch.randn(8, 8).double(), torch.randn(8).double()
    matrix = root @ root.T + 0.1 * torch.eye(8)
    found = slbo.conjugate_gradient(lambda v: matrix @ v, target, 50)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-3, atol=1e-4)
    assert torch.equal(slbo.conjugate_gradient(lambda v: matrix @ v, 0 * target, 10), 0 * target)


def test_a_trpo_step_is_the_natural_gradient_of_size_max_kl_and_is_taken_back_where_it_does_not_help():
    actor, obs = actor_and_obs()
    args = replace(TINY, damping=1e-3, max_kl=1e-6, cg_iterations=60)
    before = {name: param.detach().clone() for name, param in actor.named_parameters()}
    old = [x.detach().clone() for x in actor(obs)]
    actions, advantages = old[0] + old[1].exp() * torch.randn(40, 2).double(), torch.randn(40).double()
    log_probs = torch.distributions.Normal(actor(obs)[0], actor.log_std.exp()).log_prob(actions).sum(-1)
    entropy = slbo.limited_entropy(*actor(obs), exact=False).sum(-1)
    gain = (log_probs * advantages + 0.7 * entropy).mean()  # its gradient, where the ratio is 1
    gradient = slbo.flat(torch.autograd.grad(gain, list(actor.parameters())))
    fisher = torch.stack([slbo.fisher_product(actor, obs, v, args) for v in torch.eye(len(gradient)).double()])
    metrics = slbo.trpo_update(actor, slbo.fisher_product, obs, actions, advantages, 0.7, args)
    step = slbo.flat(actor.parameters()) - slbo.flat(before.values())
    natural = torch.linalg.solve(fisher, gradient)
    assert float(torch.cosine_similarity(step, natural, 0)) == pytest.approx(1, abs=1e-4)
    assert float(step @ fisher @ step / 2) == pytest.approx(1e-6, rel=1e-3) and metrics["losses/step_share"] == 1
    divergence = float(step @ fisher @ step - 1e-3 * step @ step) / 2
    assert float(metrics["losses/kl"]) == pytest.approx(divergence, rel=0.05)
    assert float(metrics["losses/gain"]) == pytest.approx(float(gradient @ step), rel=0.05)
    assert float(slbo.mean_kl(old, actor(obs))) == pytest.approx(float(metrics["losses/kl"]), rel=1e-6)
    for name, param in actor.named_parameters():
        param.data.copy_(before[name])
    wrong = slbo.trpo_update(actor, lambda *x: -slbo.fisher_product(*x), obs, actions, advantages, 0.0, args)
    assert wrong["losses/step_share"] == 0 and wrong["losses/gain"] == 0
    assert all(torch.equal(param, before[name]) for name, param in actor.named_parameters())


def test_trpo_learns_a_bandit():
    """The best action is 0.5 s; one step a trajectory."""
    args, actor, value = replace(TINY, max_kl=0.05), slbo.Actor(1, 1, (16,)), slbo.Value(1, TINY)
    means = []
    for _ in range(60):
        obs = torch.rand(1, 256, 1) * 2 - 1
        with torch.no_grad():
            actions = actor.sample(obs[0], torch.randn(256, 1))[None]
        rewards = -(actions - 0.5 * obs).square().sum(-1)
        steps = slbo.Steps(obs, actions, rewards, obs, torch.ones(1, 256), torch.zeros(1, 256))
        means.append(float(rewards.mean()))
        slbo.policy_update(actor, value, slbo.fisher_product, slbo.value_update, steps, 0.0, args)
    assert means[0] < -0.8 and means[-1] > -0.1
    assert float(actor(torch.tensor([[1.0]]))[0]) == pytest.approx(0.5, abs=0.2)


def test_noise_lasts_and_reaches_the_stationary_spread(monkeypatch, tmp_path):
    """Of n <- 0.85 n + 0.3 N(0, 1): variance 0.3^2 / (1 - 0.85^2), neighbours correlate by 0.85."""
    monkeypatch.setattr(slbo.Actor, "sample", lambda self, obs, noise: torch.zeros(1, 2))
    taken, step = [], pointmass.PointMass.step
    monkeypatch.setattr(pointmass.PointMass, "step", lambda self, a: taken.append(a[0] / 2) or step(self, a))
    words = dict(env_id=POINT, total_timesteps=3_000, eval_every=3_000, eval_episodes=1, stage_steps=10_000)
    slbo.train(replace(TINY, **words, ou_sigma=0.1, run_dir=str(tmp_path / "run")))
    noise = np.array(taken[-3_100:-100])  # between the evaluations, two of one episode each
    assert noise.std() == pytest.approx(0.1 / math.sqrt(1 - 0.85**2), rel=0.15)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(0.85, abs=0.04)


# ----------------------------------------------------------------------------------------------- environments
ALIVE = {
    "HalfCheetah": lambda q, v: True,
    "Swimmer": lambda q, v: True,
    "Ant": lambda q, v: 0.2 <= q[2] <= 1,
    "Humanoid": lambda q, v: 0.8 <= q[2] <= 2,
    "Walker2d": lambda q, v: 0.8 < q[1] < 2 and abs(q[2]) < 1,
    "Hopper": lambda q, v: q[1] > 0.7 and abs(q[2]) < 0.2 and (np.abs([*q[3:], *v]) < 100).all(),
}
REWARD = {  # of the centre of mass's velocity and actions as shares of their greatest
    "HalfCheetah": lambda v, u: v[0] - 0.05 * (u**2).sum(),
    "Swimmer": lambda v, u: v[0] - 0.005 * (u**2).sum(),
    "Ant": lambda v, u: v[0] - 0.005 * (u**2).sum() + 0.05,
    "Humanoid": lambda v, u: v[0] + 0.2 - 5e-4 * (u**2).sum() - 5e-3 * (v[1] ** 2 + v[2] ** 2),
    "Walker2d": lambda v, u: v[0] - 0.001 * (u**2).sum() + 1,
    "Hopper": lambda v, u: v[0] - 0.005 * (u**2).sum() + 1,
}
DIMS = dict(HalfCheetah=24, Ant=44, Walker2d=24, Hopper=18, Swimmer=16, Humanoid=53)


@pytest.mark.parametrize("robot", ALIVE)
def test_a_robots_reward_and_end_are_those_of_the_simulators_own_centre_of_mass(robot):
    env = slbo.make_env(f"SLBO{robot}-v0")
    task, rng, (obs, _) = slbo.KnownTask(env, "cpu"), np.random.default_rng(0), env.reset(seed=0)
    assert obs.shape == (DIMS[robot],) and env.spec.max_episode_steps == 200
    model, other = env.unwrapped.model, mujoco.MjData(env.unwrapped.model)
    for t in range(400):
        action = rng.uniform(-1.3, 1.3, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        other.qpos[:], other.qvel[:] = env.unwrapped.data.qpos, env.unwrapped.data.qvel
        mujoco.mj_forward(model, other)
        mujoco.mj_subtreeVel(model, other)
        velocity = other.body("torso").subtree_linvel
        np.testing.assert_allclose(next_obs[-3:], velocity, atol=1e-5)
        assert reward == pytest.approx(REWARD[robot](velocity, action.clip(-1, 1)), abs=1e-5)
        assert terminated == (not ALIVE[robot](other.qpos, other.qvel))
        tensors = [torch.tensor(x)[None] for x in (obs, action, next_obs)]
        assert float(task.reward(*tensors)) == pytest.approx(reward, abs=1e-4)
        assert task.terminates(tensors[2]).tolist() == [terminated]
        obs = env.reset(seed=t)[0] if terminated or truncated else next_obs
    assert gym.spec(f"SLBO{robot}Long-v0").max_episode_steps == 500


@pytest.mark.parametrize(
    "name,function,message",
    [
        ("reward", lambda self, obs, actions, next_obs: 1.001 - next_obs[..., :2].norm(dim=-1), "reward is wrong by"),
        ("terminates", lambda self, next_obs: next_obs[..., 0].abs() > 2, r"terminates \d+ times"),
        ("terminates", None, "has no reward"),
    ],
)
def test_functions_that_are_not_the_environments_stop_the_run(name, function, message, monkeypatch, tmp_path):
    if function is None:
        monkeypatch.delattr(pointmass.PointMass, name)
    else:
        monkeypatch.setattr(pointmass.PointMass, name, function)
    with pytest.raises(SystemExit, match=rf"^slbo\.py: .*{message}"):
        run("slbo", f"{COMMANDS['slbo']} --env-id {POINT}", tmp_path)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- runs
SMALL = dict(env_id=POINT, total_timesteps=180, stage_steps=60, eval_every=60, eval_episodes=1, rounds=2)
SMALL |= dict(model_updates=3, policy_updates=2, virtual_envs=4, virtual_steps=10, value_epochs=1)


@pytest.mark.parametrize("algo,model,virtual", [("slbo", 18, 12), ("mb-trpo", 18, 12), ("mf-trpo", 0, 0)])
def test_the_ledger(algo, model, virtual, monkeypatch, tmp_path):
    """Real steps are the training environment's; SLBO and MB-TRPO take the same numbers of updates."""
    envs, calls, order = [], dict.fromkeys(("dynamics_step", "virtual_rollout", "policy_update"), 0), []
    normalised = set()  # steps that the policy's normaliser has seen when the policy is updated
    make_env = slbo.make_env

    class Counted(gym.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            return self.env.step(action)

    monkeypatch.setattr(slbo, "make_env", lambda env_id: envs.append(Counted(make_env(env_id))) or envs[-1])

    def counted(name, function, *inputs):
        calls[name] += 1
        order.append(name[0])
        normalised.update([int(inputs[0].normalise.count)] if name == "policy_update" else [])
        return function(*inputs)

    for name in calls:
        monkeypatch.setattr(slbo, name, partial(counted, name, getattr(slbo, name)))
    rows = slbo.train(replace(TINY, **SMALL, algo=algo, run_dir=str(tmp_path / "run")))
    assert [row["env_steps"] for row in rows] == [0, 60, 120, 180] and envs[0].steps == 180
    policy = virtual or 3  # mf-trpo: one on each stage's real steps
    assert calls == dict(dynamics_step=model, virtual_rollout=virtual, policy_update=policy)
    assert "".join(order) == {"slbo": "dddvpvp" * 2, "mb-trpo": "d" * 6 + "vp" * 4, "mf-trpo": "p"}[algo] * 3
    assert normalised == ({60, 120, 180} if virtual else {0, 60, 120})  # mf-trpo's updates are of the policy that acted


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_checkpoint(tmp_path, monkeypatch):
    update, calls = slbo.value_update, []

    def breaking(*inputs):
        calls.append(1)
        return update(*inputs) * (math.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(slbo, "value_update", breaking)
    with pytest.raises(SystemExit, match=r"^slbo\.py: a loss is not finite at step \d+: .*losses/value.*nan"):
        slbo.train(replace(TINY, **SMALL, checkpoint_every=1, run_dir=str(tmp_path / "run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", importlib.import_module("slbo"))
        state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)
    assert 60 <= state["step"] < 180 and all(math.isfinite(float(x)) for x in state["metrics"].values())
