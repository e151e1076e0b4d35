"""HyPE's own blocks against hand calculation or a second method, and what its methods learn from."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hype
import hyper
from envs.wrappers import DemoStarts, TremblingHand
from evaluate import simulator_state
from tests.conftest import ROOT

HOPPER = str(ROOT / "demos" / "Hopper-v4.npz")
SMALL = dict(
    hidden_sizes=(8, 8),
    critic_hidden_sizes=(8, 8),
    cost_hidden_sizes=(8, 8),
    batch_size=16,
    cost_batch_size=8,
    num_demos=4,
)
TINY = hype.Args(device="cpu", **SMALL, env_id="Hopper-v4", demos=HOPPER, learning_starts=60, eval_episodes=1)
OBS, ACT = 11, 3


def settings(algo: str, **others) -> hype.Args:
    return replace(TINY, algo=algo, **(hype.ALGOS[algo] | others))


def transitions(n: int, mean: float = 0.0) -> hype.Batch:
    obs, actions = torch.randn(n, OBS) + mean, torch.rand(n, ACT)
    return hype.Batch(obs, actions, torch.zeros(n), obs, torch.zeros(n))


def keys(obs, actions) -> list[bytes]:
    """Rows of obs and actions as something that can be looked up in a set."""
    return [row.tobytes() for row in np.concatenate([obs, actions], 1, dtype=np.float32)]


@pytest.mark.parametrize("script,loss", [(hyper, "moment"), (hype, "logistic"), (hype, "moment")])
def test_cost_gradient_is_that_of_the_written_out_loss(script, loss):
    torch.manual_seed(0)
    args = script.Args(device="cpu", gp_target=0.4, gp_coef=3.0, cost_hidden_sizes=(8, 8))
    args = replace(args, cost_loss=loss) if script is hype else args
    cost, mix = script.Cost(OBS, ACT, args).double(), torch.rand(32, 1).double()
    expert, learner = (hype.Batch(*(field.double() for field in transitions(32, mean))) for mean in (0.0, 0.5))
    cost.normalise.fit(torch.cat([expert.obs, expert.actions], 1))

    def f(x):
        for weight, bias in zip(cost.net.weights[:-1], cost.net.biases[:-1], strict=True):
            x = (x @ weight[0] + bias[0]).relu()
        return (x @ cost.net.weights[-1][0] + cost.net.biases[-1][0])[:, 0]

    x, y = ((torch.cat(data[:2], 1) - cost.normalise.mean) / cost.normalise.std for data in (expert, learner))
    between = (mix * x + (1 - mix) * y).requires_grad_()
    (slope,) = torch.autograd.grad(f(between).sum(), between, create_graph=True)
    theirs = 3 * (slope.norm(dim=1) - 0.4).square().mean()
    if loss == "moment":
        theirs = theirs + f(x).mean() - f(y).mean()
    else:  # f is the logit of "learner"
        theirs = theirs - (1 - f(x).sigmoid()).log().mean() - f(y).sigmoid().log().mean()
    ours, mean = script.cost_loss(cost, expert, learner, mix, args)
    torch.testing.assert_close((ours, mean), (theirs, f(y).mean().detach()))
    params = list(cost.net.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params))


@pytest.mark.parametrize("loss", ["moment", "logistic"])
def test_the_reward_is_the_softplus_of_the_learners_mean_cost_minus_the_cost(loss):
    """A running mean over the learner's batches, here kept beside a cost that nobody shifts. Logistic: without it."""
    torch.manual_seed(0)
    args, mean = hype.Args(device="cpu", cost_loss=loss, cost_lr=1e-3, cost_hidden_sizes=(16, 16)), 0.0
    torch.set_default_dtype(torch.float64)
    cost, expert, learner = hype.Cost(OBS, ACT, args), transitions(64), transitions(64, 1.0)
    torch.set_default_dtype(torch.float32)
    plain = copy.deepcopy(cost)
    for k in range(1, 151):
        mix = torch.rand(64, 1)
        value, mean_now = hype.cost_loss(plain, expert, learner, mix, args)
        plain.optimizer.step(torch.autograd.grad(value, plain.optimizer.params))
        mean += max(0.01, 1 / k) * (mean_now.item() - mean)
        hype.cost_update(cost, expert, learner, mix, args)
    f = plain(torch.cat([learner.obs, learner.actions], 1))
    expected = F.softplus(mean - f if loss == "moment" else -f)
    torch.testing.assert_close(cost.reward(learner.obs, learner.actions), expected)
    better = cost.reward(expert.obs, expert.actions).mean()
    assert better > expected.mean() + 0.1 and abs(mean) > 0.1 and abs(f.mean()) > 0.1


def test_the_methods_differ_in_what_their_names_say():
    for algo in hype.ALGOS:
        args = settings(algo)
        assert (args.expert_ratio > 0) == ("hype" in algo) and (args.reset_prob > 0) == ("filter" in algo)
        assert (args.cost_loss == "logistic") == (algo == "gail") and (args.bc_coef > 0) == ("hype" in algo)


@pytest.mark.parametrize("script", [hype, hyper])
def test_without_expert_rows_nothing_is_cloned(script):
    torch.manual_seed(0)
    args = script.Args(device="cpu", hidden_sizes=(8, 8), bc_coef=1_000.0)
    agent, batch, noise = script.Agent(OBS, ACT, args), transitions(16), torch.randn(16, ACT)
    loss, _ = script.actor_loss(agent, batch, transitions(0), noise, args)
    plain, _ = script.actor_loss(agent, batch, transitions(8), noise, replace(args, bc_coef=0.0))
    assert loss.isfinite() and loss == plain
    assert script.actor_loss(agent, batch, transitions(8), noise, args)[0] > plain


@pytest.mark.parametrize("algo,subsample,own,of_expert", [("hype", 1, 8, 8), ("hype", 1_000, 12, 4), ("mm", 1, 16, 0)])
def test_what_a_batch_holds(algo, subsample, own, of_expert, tmp_path, monkeypatch):
    """Expert (as many as there are, at most) and learner transitions, all with rewards from the cost as it is now."""
    data, *_ = hype.load_demos(HOPPER, hype.make_env("Hopper-v4"), TINY.num_demos, subsample, "cpu")
    shown, costs, rewards = set(keys(data.obs, data.actions)), [], []
    init, loss = hype.Cost.__init__, hype.critic_loss

    def watch(agent, batch, noise, args):
        from_expert = [key in shown for key in keys(batch.obs, batch.actions)]
        assert from_expert == [False] * own + [True] * of_expert
        torch.testing.assert_close(batch.rewards, costs[0].reward(batch.obs, batch.actions))
        rewards.append(batch.rewards.mean().item())
        return loss(agent, batch, noise, args)

    monkeypatch.setattr(hype.Cost, "__init__", lambda self, *rest: [costs.append(self), init(self, *rest)][1])
    monkeypatch.setattr(hype, "critic_loss", watch)
    hype.train(settings(algo, demo_subsample=subsample, total_timesteps=100, cost_lr=0.01, run_dir=str(tmp_path)))
    assert len(rewards) == 41 and np.std(rewards) > 0.01


@pytest.mark.parametrize("script", [hype, hyper])
def test_early_episodes_are_cut_and_half_are_acted_without_noise(script, tmp_path, monkeypatch):
    """A cut is no termination; the actor draws noise or acts as in evaluations for whole episodes."""
    starts, terminations, acted = [], [], {}
    make, add, act = script.make_env, script.ReplayBuffer.add, script.Actor.act

    def counted(env_id):
        env = make(env_id)
        reset = env.reset
        env.reset = lambda **seed: [starts.append((env, len(terminations))), reset(**seed)][1]
        return env

    def watch(self, obs, deterministic=False):
        acted.setdefault(len(terminations), deterministic)  # an evaluation comes before the step's own action
        return act(self, obs, deterministic)

    monkeypatch.setattr(script, "make_env", counted)
    monkeypatch.setattr(
        script.ReplayBuffer, "add", lambda self, *row: [terminations.append(row[4]), add(self, *row)][1]
    )
    monkeypatch.setattr(script.Actor, "act", watch)
    monkeypatch.setattr(script, "cost_update", lambda *_: torch.zeros(()))
    monkeypatch.setattr(hyper, "fit_dynamics", lambda *_: 0.0)
    run = dict(
        env_id="HalfCheetah-v4", demos=HOPPER.replace("Hopper", "HalfCheetah"), updates_per_step=0, eval_episodes=1
    )
    run |= SMALL | dict(learning_starts=60, total_timesteps=2_100, eval_every=5_000, reset_until=1_000)
    script.train(script.Args(**run, device="cpu", run_dir=str(tmp_path)))
    begins = [at for env, at in starts if env is starts[0][0]]
    assert begins == [0, 250, 500, 750, 1_000, 2_000] and not any(terminations)
    modes = [{acted[t] for t in range(a, b) if t in acted and t >= 100} for a, b in pairwise([*begins, 2_100])]
    assert all(len(mode) == 1 for mode in modes) and {True} in modes and {False} in modes


@pytest.mark.parametrize("script", [hype, hyper])
def test_the_cost_sees_the_expert_at_the_learners_times(script, tmp_path, monkeypatch):
    """The learner falls early, so the expert's rows are early ones, in proportion to the learner's."""
    drawn, taken, add, update = [], [], script.ReplayBuffer.add, script.cost_update
    monkeypatch.setattr(script.ReplayBuffer, "add", lambda self, *row: [taken.append(row[4]), add(self, *row)][1])
    monkeypatch.setattr(script, "cost_update", lambda *x: [drawn.append(x[1].obs), update(*x)][1])
    monkeypatch.setattr(hyper, "fit_dynamics", lambda *_: 0.0)
    run = SMALL | dict(env_id="Hopper-v4", demos=HOPPER, learning_starts=300, total_timesteps=500, updates_per_step=0)
    run |= dict(cost_batch_size=64, eval_episodes=1, device="cpu", run_dir=str(tmp_path), compile="off")
    script.train(script.Args(**run))
    observations = np.load(HOPPER)["observations"][:4_000]
    time_of = {obs.tobytes(): row % 1_000 for row, obs in enumerate(observations.astype(np.float32))}
    times = np.array([time_of[obs.numpy().tobytes()] for batch in drawn for obs in batch])
    ends = np.flatnonzero(taken)
    visited = np.arange(500) - np.concatenate([[0], ends + 1])[np.searchsorted(ends, np.arange(500))]
    assert len(drawn) == 201 and times.max() < visited.max() + 13 < 300
    assert abs(times.mean() - visited[:400].mean()) < 5


@pytest.mark.parametrize("script", [hype, hyper])
def test_the_hand_trembles_in_training_and_in_evaluation(script, tmp_path, monkeypatch):
    seen, step = [], TremblingHand.action
    monkeypatch.setattr(
        TremblingHand, "action", lambda hand, *action: seen.append(hand.p_tremble) or step(hand, *action)
    )
    settings = dict(device="cpu", env_id="Hopper-v4", demos=HOPPER, total_timesteps=50, eval_episodes=2, p_tremble=0.3)
    rows = script.train(script.Args(**settings, run_dir=str(tmp_path)))
    assert len(seen) == 50 + 2 * sum(row["eval_length_mean"] for row in rows) and set(seen) == {0.3}


def hopper(num_demos: int, prob: float) -> DemoStarts:
    return DemoStarts(hype.make_env("Hopper-v4"), HOPPER, num_demos, prob)


def test_resets_continue_the_demonstration_to_the_last_bit():
    """The simulator's state, the observation, the steps left and what the demonstrated actions lead to."""
    env, data = hopper(2, 1.0), dict(np.load(HOPPER))
    for seed in range(2):
        obs, info = env.reset(seed=seed)
        (row,), truncated = np.flatnonzero((data["observations"] == obs).all(1)), False
        assert info["demo_start"] and row < 2_000 and row % 4 == 0
        np.testing.assert_array_equal(simulator_state(env), data["states"][row // 4])
        assert env.get_wrapper_attr("episode_lengths") == row % 1_000  # by which the cost's expert rows are drawn
        for t in range(row, row + 1_000 - row % 1_000):
            assert not truncated
            obs, _, terminated, truncated, _ = env.step(data["actions"][t])
            np.testing.assert_array_equal(obs, data["next_observations"][t])
        assert truncated and not terminated


def test_states_of_episodes_of_different_lengths(tmp_path):
    """Of 601, 1,000 and 399 steps; the first two are used. A file without states will not do."""
    states, env, path = np.load(HOPPER)["states"], hype.make_env("Hopper-v4"), str(tmp_path / "cut.npz")
    states = np.concatenate([states[:151], states[250:500], states[500:600]])
    np.savez(path, states=states)
    np.testing.assert_array_equal(DemoStarts(env, path, 2, 1.0).states, states[: 151 + 250])
    np.savez(path, observations=states)
    with pytest.raises(SystemExit, match=r"cut\.npz has no simulator states"):
        DemoStarts(env, path, 2, 1.0)


def test_resets_have_their_probability_and_their_seed_decides():
    env, plain, times, seen = hopper(10, 0.3), hype.make_env("Hopper-v4"), [], set()
    for seed in range(400):
        obs, info = env.reset(seed=seed)
        seen.add(obs.tobytes())
        np.testing.assert_array_equal(obs, env.reset(seed=seed)[0])
        if info["demo_start"]:
            times.append(env.get_wrapper_attr("_elapsed_steps"))
        else:
            np.testing.assert_array_equal(obs, plain.reset(seed=seed)[0])
    assert 80 < len(times) < 160 and 400 < np.mean(times) < 600 and len(seen) > 380  # 120 +- 9, 498 +- 26


def test_policy_and_cost_see_all_episodes_and_every_step_counts(tmp_path, monkeypatch):
    """Those that started at an expert's state, too."""
    kinds, taken = [], {True: set(), False: set()}
    reset, add = DemoStarts.reset, hype.ReplayBuffer.add

    def watch_reset(self, **seed):
        obs, info = reset(self, **seed)
        kinds.append(info["demo_start"])
        return obs, info

    def watch_add(self, obs, action, *rest):
        taken[kinds[-1]].update(keys([obs], [action]))
        add(self, obs, action, *rest)

    def watched(function, seen: set):
        def call(agent, *inputs):
            seen.update(keys(inputs[1].obs, inputs[1].actions))
            return function(agent, *inputs)

        return call

    judged, trained_on = set(), set()
    monkeypatch.setattr(DemoStarts, "reset", watch_reset)
    monkeypatch.setattr(hype.ReplayBuffer, "add", watch_add)
    monkeypatch.setattr(hype, "cost_update", watched(hype.cost_update, judged))
    monkeypatch.setattr(hype, "sac_update", watched(hype.sac_update, trained_on))
    rows = hype.train(settings("filter", total_timesteps=300, run_dir=str(tmp_path)))
    assert all(seen & taken[kind] for seen in (judged, trained_on) for kind in (True, False))
    assert rows[-1]["env_steps"] == 300 == len(taken[False]) + len(taken[True])


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_the_critics_targets_bootstrap_from_no_value_below_0(level):
    torch.manual_seed(0)
    agent, batch, noise = hype.Agent(OBS, ACT, TINY), transitions(16), torch.randn(16, ACT)
    batch = batch._replace(rewards=torch.rand(16), terminations=(torch.rand(16) < 0.3).float())
    agent.critic.net.biases[-1].data.fill_(level)
    loss, _ = hype.critic_loss(agent, batch, noise, TINY)
    next_actions, log_prob = agent.actor.sample(batch.next_obs, noise)
    both = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.actions, next_actions])
    q, next_q = agent.critic(*both, train=True).detach().chunk(2, 1)
    value = (next_q.amin(0) - agent.log_alpha.exp() * log_prob) * (level > 0)  # all are far from 0
    target = batch.rewards + 0.99 * (1 - batch.terminations) * value
    torch.testing.assert_close(loss, ((q[0] - target) ** 2).mean() + ((q[1] - target) ** 2).mean())


def test_the_critics_are_two_networks_with_batch_normalisation():
    """Against torch's own modules: values, gradients, and the running statistics that values without `train` use."""
    torch.manual_seed(0)
    ours = hype.Critic(OBS, ACT, (8, 6))
    for norm in ours.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    theirs, sizes = [], (OBS + ACT, 8, 6, 1)
    for k in range(2):
        layers = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            norm, linear = nn.BatchNorm1d(before, momentum=0.01), nn.Linear(before, after)
            half = slice(k * before, (k + 1) * before)
            norm.weight.data, norm.bias.data = ours.norms[i].weight.data[half], ours.norms[i].bias.data[half]
            linear.weight.data, linear.bias.data = ours.net.weights[i].data[k].T, ours.net.biases[i].data[k, 0]
            layers += [norm, linear, nn.ReLU()]
        theirs.append(nn.Sequential(*layers[:-1]))
    for train in (True, True, False):
        obs, actions = 2 * torch.randn(32, OBS) + 1, torch.rand(32, ACT)
        expected = torch.stack([net.train(train)(torch.cat([obs, actions], 1))[:, 0] for net in theirs])
        q = ours(obs, actions, train)
        torch.testing.assert_close(q, expected)
    slopes = torch.autograd.grad(q.square().sum(), ours.net.weights)
    expected = [
        torch.autograd.grad(expected.square().sum(), [net[3 * i + 1].weight for net in theirs], retain_graph=True)
        for i in range(3)
    ]
    for slope, pair in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, torch.stack(pair).mT)
