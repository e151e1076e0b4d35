"""What hyper_paper.py has of its own, by hand or by a second method: optimiser, cost, model, schedules, cadences."""

import math
from collections import defaultdict
from dataclasses import asdict, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hyper
import hyper_paper
import sac

SIZES = dict(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), cost_hidden_sizes=(8, 8))
TINY = hyper_paper.Args(device="cpu", **SIZES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_batch(n: int, shift: float = 0.0) -> hyper_paper.Batch:
    obs, actions = torch.randn(n, 3) + shift, torch.rand(n, 2) - 0.5 + shift
    return hyper_paper.Batch(obs, actions, torch.randn(n), torch.randn(n, 3), (torch.rand(n) < 0.5).float())


def lr_of(optimizer: hyper_paper.OptimisticAdam) -> float:
    """The learning rate of its last step."""
    t = optimizer.t.item()
    return optimizer.scale.item() * (1 - 0.9**t) / math.sqrt(1 - 0.999**t)


# ------------------------------------------------------------------------------------------- optimiser and cost
@pytest.mark.parametrize("optimistic", [True, False])
def test_optimistic_adam_is_the_recursion_written_out(optimistic):
    """p += s m(t-1) / (sqrt(v(t-1)) + eps), new moments, p -= 2 s m(t) / (sqrt(v(t)) + eps), the same s for both."""
    p = torch.nn.Parameter(torch.randn(6))
    q = p.detach().double()
    optimizer = hyper_paper.OptimisticAdam([p], weight_decay=0.1, optimistic=optimistic)
    for _ in range(2):  # the second time after a restart
        m, v = torch.zeros(6).double(), torch.zeros(6).double()
        for t in range(1, 16):
            grad, lr = torch.randn(6), 0.01 if t < 10 else 0.002
            optimizer.step([grad], lr)
            g, s = grad.double() + 0.1 * q, lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            q += s * m / (v.sqrt() + 1e-8) * optimistic
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            q -= s * m / (v.sqrt() + 1e-8) * (1 + optimistic)
        torch.testing.assert_close(p.detach(), q.float(), rtol=1e-5, atol=1e-6)
        optimizer.restart()


def test_a_cost_round_moves_a_weight_by_twice_its_size_along_the_sign():
    """One weight has the gradient of mean f(expert) - mean f(learner) all the time, the bias has none."""
    cost = hyper_paper.CostEnsemble(1, 1, replace(TINY, cost_members=1, cost_hidden_sizes=()))
    weight, bias = cost.net.weights[0], cost.net.biases[0].item()
    weight.data = torch.tensor([[[0.4], [0.0]]])  # |grad f| is 0.4 at first: no penalty
    far, zeros = torch.full((4, 1), 1e6), torch.zeros(4, 1)  # the moments' difference outweighs the penalty
    expert, learner = (hyper_paper.Batch(obs, zeros, zeros[:, 0], obs, zeros[:, 0]) for obs in (far, -far))
    for lr in (8e-4, 8e-4, 4e-4, 8e-3):
        before = weight[0, 0, 0].item()
        hyper_paper.cost_round(cost, expert, learner, torch.rand(4, 1), lr)
        assert before - weight[0, 0, 0].item() == pytest.approx(2 * lr, rel=1e-3)
    assert cost.net.biases[0].item() == bias


@pytest.mark.parametrize("clamp", [None, 0.2])
def test_moment_loss_and_its_gradient_are_those_of_the_loss_written_out(clamp):
    cost = hyper_paper.CostEnsemble(3, 2, replace(TINY, output_clamp=clamp)).double()
    expert, learner = (hyper_paper.Batch(*(x.double() for x in make_batch(16, shift))) for shift in (0.0, 1.0))
    mix, inputs = torch.rand(16, 1).double(), [torch.cat(batch[:2], -1) for batch in (expert, learner)]

    def f(x):
        members = cost.net(x.expand(7, -1, -1))[..., 0]
        return (members if clamp is None else members.clamp(-clamp, clamp)).min(0).values

    on_expert, on_learner = map(f, inputs)
    points = (mix * inputs[0] + (1 - mix) * inputs[1]).requires_grad_()
    (slope,) = torch.autograd.grad(f(points).sum(), points, create_graph=True)
    slope = (slope.square().sum(1) + 1e-12).sqrt()  # where the clamp holds, the slope is 0
    theirs = on_expert.mean() - on_learner.mean() + 10 * (slope - 0.4).square().mean()
    ours, params = hyper_paper.moment_loss(cost, expert, learner, mix), list(cost.parameters())
    assert clamp is None or (on_learner.abs() == clamp).any()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params))
    torch.testing.assert_close(cost.reward(expert.obs[None], expert.actions[None]), -on_expert[None])


# ------------------------------------------------------------------------------------------- SAC and the model
@pytest.mark.parametrize("alpha_lr", [0.0, 1e-3])
def test_sac_update_steps_along_the_gradients_of_the_losses_of_sac(alpha_lr):
    """A first step of optimistic Adam is 2 lr g / (|g| + 3.16e-7). The actor has states of its own."""
    args = replace(TINY, alpha=0.3, alpha_lr=alpha_lr, gamma=0.9, target_entropy=100.0)
    agent, settings = hyper_paper.Agent(3, 2, args), sac.Args(device="cpu", hidden_sizes=(8, 8), alpha=0.3, gamma=0.9)
    twin = sac.Agent(3, 2, settings)
    twin.actor.load_state_dict(agent.actor.state_dict())
    for critic in (twin.critic, twin.target_critic):
        critic.net.load_state_dict(agent.critic.state_dict())
    batch, actor_obs, noise = make_batch(16), torch.randn(16, 3), torch.randn(2, 16, 2)
    metrics = hyper_paper.sac_update(agent, batch, actor_obs, noise, args)

    def check(name, loss, lr):
        torch.testing.assert_close(metrics[f"losses/{name}"], loss.detach(), rtol=1e-4, atol=1e-4)
        params = list(getattr(twin, name).parameters())
        grads = torch.autograd.grad(loss, params)
        expected = [p - 2 * lr * g / (g.abs() + 3.1623e-7) for p, g in zip(params, grads, strict=True)]
        torch.testing.assert_close(list(getattr(agent, name).parameters()), expected, rtol=1e-4, atol=lr / 50)

    check("critic", sac.critic_loss(twin, batch, noise[0], settings)[0], args.critic_lr)
    twin.critic.net.load_state_dict(agent.critic.state_dict())
    loss, entropy = sac.actor_loss(twin, batch._replace(obs=actor_obs), noise[1], settings)
    check("actor", loss, args.actor_lr)
    torch.testing.assert_close(metrics["losses/entropy"], entropy)
    assert agent.log_alpha > twin.log_alpha if alpha_lr else agent.log_alpha == twin.log_alpha  # entropy is too low


def test_model_fit_and_rollouts_are_those_of_hyper_where_nothing_is_clamped():
    """The same numbers from the same seed: likelihood, Adam, bootstrap, held-out choice, elites' shares, rollouts."""
    settings = dict(model_members=7, model_elites=5, model_lr=3e-3, model_batch_size=64, model_patience=2)
    theirs = hyper.Args(device="cpu", rollout_noise=True, **SIZES, **settings)
    ours = replace(TINY, **settings)
    models = hyper.EnsembleDynamics(3, 2, theirs), hyper_paper.Dynamics(3, 2, ours)
    actor = hyper_paper.Actor(3, 2, (8,))
    models[1].net.load_state_dict(models[0].net.state_dict())
    data = make_batch(800)
    data = data._replace(next_obs=2 * data.obs + data.next_obs)  # a change of variance 2, half of it noise
    torch.manual_seed(1)
    error = hyper.fit_dynamics(models[0], hyper.dynamics_update, data, torch.ones(800), 10**6, theirs)
    rollouts = hyper.imagine(models[0], actor, data.obs[:103], 4, lambda s: s[:, 0] > 2, theirs)
    torch.manual_seed(1)
    assert hyper_paper.fit_ensemble(models[1], hyper_paper.likelihood_update, data, ours) == pytest.approx(error, 1e-3)
    imagined = hyper_paper.imagine_rollouts(models[1], actor, data.obs[:103], 4, lambda s: s[:, 0] > 2)
    assert error < 1.5 and models[0].elites.tolist() == models[1].elites.tolist()
    torch.testing.assert_close(list(imagined), list(rollouts), rtol=1e-2, atol=1e-2)


def test_mean_changes_are_bounded_and_learning_rates_follow_the_cosine_and_the_sawtooth_in_one_graph_each():
    torch._dynamo.config.trace_autograd_ops = True
    args = replace(TINY, model_cosine=4, model_lr=1e-2, lr_sawtooth=5, actor_lr=1e-3, critic_lr=2e-3, output_clamp=0.05)
    agent, model = hyper_paper.Agent(3, 2, args), hyper_paper.Dynamics(3, 2, args)
    assert model(10 * torch.randn(7, 50, 5))[0].abs().max().item() == pytest.approx(0.05)
    counter = CompileCounterWithBackend("aot_eager")
    update_model = torch.compile(hyper_paper.likelihood_update, backend=counter, dynamic=False)
    update = torch.compile(hyper_paper.sac_update, backend=counter, dynamic=False)
    for k in range(12):
        if k == 9:
            agent.critic_optimizer.restart()
            agent.actor_optimizer.restart()
        update_model(model, torch.randn(7, 8, 5), torch.randn(7, 8, 3), args)
        update(agent, make_batch(8), torch.randn(8, 3), torch.randn(2, 8, 2), args)
        assert lr_of(model.optimizer) == pytest.approx(0.005 * (1 + math.cos(math.pi * k / 4)), rel=1e-4, abs=1e-8)
        rates, left = map(lr_of, (agent.actor_optimizer, agent.critic_optimizer)), max(0, 1 - k % 9 / 5)
        assert list(rates) == pytest.approx([1e-3 * left, 2e-3 * left], rel=1e-4, abs=1e-8)
        assert lr_of(agent.alpha_optimizer) == pytest.approx(3e-4, rel=1e-4)
    assert counter.frame_count == 2


# ------------------------------------------------------------------------------------------- settings and a run
def test_tuned_is_the_published_table():
    table = dict(
        hidden_sizes=[(512, 512), (1024, 1024), (1024, 1024), (1024, 1024)],
        actor_lr=[3e-4, 1e-4, 1e-4, 1e-4],
        critic_lr=[3e-4, 1e-4, 1e-4, 1e-4],
        lr_sawtooth=[0, 10_000, 0, 10_000],
        alpha=[1, 0.2, 0.2, 1],
        alpha_lr=[3e-4, 0, 0, 1e-4],
        target_entropy=[1, None, None, pytest.approx(-17 - 17 * math.log(0.4), abs=0.005)],  # theirs: in [-0.4, 0.4]
        updates_per_step=[30, 20, 30, 20],
        update_every=[1, 2, 1, 2],
        model_hidden_sizes=[(400,) * 4, (200,) * 4, (400,) * 4, (400,) * 4],
        model_cosine=[0, 30_000, 0, 0],
        output_clamp=[None, 40, 40, None],
        cost_weight_decay=[0, 5e-5, 5e-5, 0],
        cost_every=[1_000, 1_000, 200, 1_000],
        reset_every=[1_000, 1_000, 200, 1_000],
        rollout_epochs=[(20, 100), (20, 100), (20, 100), (20, 300)],
        p_tremble=[0.01, 0.01, 0.01, 0.025],
    )
    defaults = asdict(hyper_paper.Args())
    for column, robot in enumerate(("Hopper", "Walker2d", "Ant", "Humanoid")):
        expected = defaults | {name: values[column] for name, values in table.items()}
        assert defaults | hyper_paper.TUNED[robot] == expected, robot
    assert hyper_paper.TUNED["HalfCheetah"] == hyper_paper.TUNED["Walker2d"]


def test_a_trembling_hand_replaces_the_given_share_of_actions_as_the_seed_says():
    hand, intended = hyper_paper.TremblingHand(hyper_paper.make_env("Pendulum-v1"), 0.3), np.full(1, 0.5, np.float32)

    def actions(seed: int) -> np.ndarray:
        hand.reset(seed=seed)
        return np.array([hand.action(intended) for _ in range(2_000)])

    first, again, other = map(actions, (0, 0, 1))
    trembled = first[first != 0.5]
    assert abs(len(trembled) - 600) < 5 * math.sqrt(2_000 * 0.3 * 0.7)
    assert trembled.min() < -0.9 and trembled.max() > 0.9
    assert (first == again).all() and (first != other).any()


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """A function that trains, and returns what the parts of the training were called with.

    Expert states begin with numbers above 100, those imagined in fit number k with 1000 + k.
    """
    obs, zeros = np.arange(100.0, 131)[:, None] * np.ones(3), np.zeros(30)
    columns = dict(observations=obs[:-1], next_observations=obs[1:], actions=np.zeros((30, 1)), rewards=zeros)
    columns |= dict(terminations=zeros, truncations=np.eye(30)[-1], metadata='{"checked": "made up"}')
    np.savez(tmp_path / "demos.npz", **columns)
    seen, original = defaultdict(list), {name: getattr(hyper_paper, name) for name in ("make_env", "sac_update")}

    def make_env(env_id):
        env = original["make_env"](env_id)
        env.reset, env.step = Mock(wraps=env.reset), Mock(wraps=env.step)  # counts calls
        seen["envs"].append(env)
        return env

    def fit_ensemble(dynamics, update, data, args):
        seen["queues"].append(data.obs[:, 0].clone())
        return 0.0

    def imagine_rollouts(dynamics, actor, obs, length, terminates):
        seen["starts"].append((obs[:, 0] >= 100).float().mean().item())
        seen["lengths"].append(length)
        x, zeros = torch.full((4_500, 3), 1_000.0 + len(seen["starts"])), torch.zeros(4_500)
        return hyper_paper.Batch(x, zeros[:, None], zeros, x, zeros)

    def sac_update(agent, batch, actor_obs, noise, args):
        seen["agent"] = agent
        seen["moments"].append([agent.actor_optimizer.t.item(), agent.critic_optimizer.t.item()])
        seen["batches"].append((1_000 + len(seen["starts"]), batch, actor_obs))
        return original["sac_update"](agent, batch, actor_obs, noise, args)

    def polyak(target, source, tau):
        seen["targets"].append((len(seen["batches"]), tau))

    def cost_round(cost, expert, learner, mix, lr):
        torch.testing.assert_close(learner.actions, seen["agent"].actor(learner.obs)[0].tanh().detach())
        last = seen["batches"][-1][1]
        torch.testing.assert_close(last.rewards, cost.reward(last.obs, last.actions))
        cost.net.biases[-1].data += 1  # the next rewards are other ones
        seen["rounds"].append((len(seen["batches"]), lr, expert.obs[:, 0], learner.obs[:, 0]))
        return torch.zeros(())

    for function in (make_env, fit_ensemble, imagine_rollouts, sac_update, polyak, cost_round):
        monkeypatch.setattr(hyper_paper, function.__name__, function)

    def run(**changes):
        settings = dict(env_id="Pendulum-v1", num_demos=1, demos=str(tmp_path / "demos.npz"), learning_starts=20)
        settings |= dict(eval_every=9_000, eval_episodes=1, batch_size=32, reset_every=10, model_every=4, p_tremble=0.0)
        settings |= dict(rollouts_per_step=2, rollout_epochs=(0, 2), rollout_length=(1, 5), cost_batch_size=64)
        settings |= dict(cost_episodes=2, updates_per_step=3, lr_sawtooth=50, run_dir=str(tmp_path / "run"))
        seen["rows"] = hyper_paper.train(replace(TINY, **settings | changes))
        return seen

    return run


def test_cadences_of_a_run(watch):
    seen = watch(total_timesteps=60, cost_every=10, update_every=2)

    # Every real step counts: 60 of training and four rounds of two whole episodes.
    assert [env.step.call_count for env in seen["envs"][:2]] == [60, 1_600]
    assert [row["env_steps"] for row in seen["rows"]] == [0, 1_660]
    assert seen["envs"][0].reset.call_count == 1 + 5  # cut when learning begins and each 10 steps

    # Cost: a round each 10 steps, of sizes lr, lr, lr / 2, lr / 3, on episodes that nothing else has seen.
    assert [(updates, round(8e-4 / lr)) for updates, lr, *_ in seen["rounds"]] == [(18, 1), (33, 1), (48, 2), (63, 3)]
    known = seen["queues"][-1]
    for _, _, expert, learner in seen["rounds"]:
        assert expert.min() >= 100 and len(expert) == len(learner) == 64 and not torch.isin(learner, known).any()
        known = torch.cat([known, learner])

    # The queue: all demonstrations, the warm-up, then an expert transition for each of the learner's.
    for number, queue in enumerate(seen["queues"]):
        assert len(queue) == 30 + 20 + 8 * number and (queue[30:50] < 100).all()
        assert (queue[:30] == torch.arange(100.0, 130.0)).all()
        assert ((queue[50:] >= 100) == torch.arange(8 * number) % 2).all()
    assert len(seen["starts"]) == 11 and set(seen["starts"]) == {0.0, 1.0}  # one coin for all starts of a call

    # SAC: the last 6,000 imagined transitions alone, other ones for the actor; targets each 4 updates; restarts.
    assert seen["targets"] == [(k, 0.005) for k in range(4, 64, 4)]
    for newest, batch, actor_obs in seen["batches"][6:]:  # from the second fit on
        assert set(batch.obs[:, 0].tolist()) | set(actor_obs[:, 0].tolist()) == {newest - 1, newest}
        assert (batch.obs != actor_obs).any() and 0 < (batch.obs[:, 0] < newest).sum() < 20  # of 32, 8 are expected
    assert seen["moments"] == [[k, k] for k in (*range(18), *range(15), *range(15), *range(15))]


def test_imagined_rollouts_grow_from_epoch_to_epoch_of_1000_steps(watch):
    seen = watch(total_timesteps=2_520, model_every=500, cost_every=9_000, update_every=9_000)
    assert seen["lengths"] == [3, 3, 3, 5, 5, 5]  # epochs 1, 1, 1, 2, 2, 3
