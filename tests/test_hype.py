"""HyPE's own blocks against hand calculation or a second method, and what its methods learn from."""

import copy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hype
from evaluate import simulator_state
from tests import pointmass

HOPPER = str(Path(hype.__file__).parent / "demos/Hopper-v4.npz")
SMALL = dict(hidden_sizes=(8, 8), cost_hidden_sizes=(8, 8), batch_size=16, cost_batch_size=8, num_demos=4)
TINY = hype.Args(**SMALL, env_id="Hopper-v4", demos=HOPPER, learning_starts=60, eval_episodes=1)
OBS, ACT = 11, 3


def settings(algo: str, **others) -> hype.Args:
    return replace(TINY, algo=algo, **(hype.ALGOS[algo] | others))


def transitions(n: int, mean: float = 0.0) -> hype.Batch:
    obs, actions = torch.randn(n, OBS) + mean, torch.rand(n, ACT)
    return hype.Batch(obs, actions, torch.zeros(n), obs, torch.zeros(n))


def keys(obs, actions) -> list[bytes]:
    """Rows of obs and actions as something that can be looked up in a set."""
    return [row.tobytes() for row in np.concatenate([obs, actions], 1, dtype=np.float32)]


@pytest.fixture
def shown() -> set[bytes]:
    """Every transition of the demonstrations in use."""
    expert, _ = hype.load_demos(HOPPER, hype.make_env("Hopper-v4"), TINY.num_demos, "cpu")
    return set(keys(expert.obs, expert.actions))


@pytest.fixture
def no_evaluation(monkeypatch):
    """Steps of the environment are then those of training."""
    monkeypatch.setattr(hype, "evaluate", lambda *_, **__: dict(eval_return_mean=0.0))


# ------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("loss", ["moment", "logistic"])
def test_cost_gradient_is_that_of_the_written_out_loss(loss):
    torch.manual_seed(0)
    args = hype.Args(cost_loss=loss, gp_target=0.4, gp_coef=3.0, cost_hidden_sizes=(8, 8))
    cost, expert, learner, mix = hype.Cost(OBS, ACT, args), transitions(32), transitions(32, 0.5), torch.rand(32, 1)
    cost.double().normalise.fit(torch.cat([expert.obs, expert.actions], 1).double())
    ours, mean = hype.cost_loss(cost, expert, learner, mix.double(), args)

    def f(x):
        for weight, bias in zip(cost.net.weights[:-1], cost.net.biases[:-1], strict=True):
            x = (x @ weight[0] + bias[0]).relu()
        return (x @ cost.net.weights[-1][0] + cost.net.biases[-1][0])[:, 0]

    x, y = (cost.normalise(torch.cat([data.obs, data.actions], 1).double()) for data in (expert, learner))
    between = (mix * x + (1 - mix) * y).requires_grad_()
    (slope,) = torch.autograd.grad(f(between).sum(), between, create_graph=True)
    theirs = 3 * (slope.norm(dim=1) - 0.4).square().mean()
    if loss == "moment":
        theirs = theirs + f(x).mean() - f(y).mean()
    else:  # f is the logit of "learner"
        theirs = theirs - (1 - f(x).sigmoid()).log().mean() - f(y).sigmoid().log().mean()
    torch.testing.assert_close((ours, mean), (theirs, f(y).mean().detach()))
    params = list(cost.net.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params))


def test_gradient_penalty_of_a_linear_cost():
    args = hype.Args(cost_hidden_sizes=(), gp_target=0.5)
    cost, same = hype.Cost(OBS, ACT, args), transitions(50)
    cost.net.weights[0].data = F.normalize(torch.randn(1, OBS + ACT, 1), dim=1) * 1.3
    loss, _ = hype.cost_loss(cost, same, same, torch.rand(50, 1), args)  # equal data: only the penalty is left
    assert loss.item() == pytest.approx(10 * (1.3 - 0.5) ** 2, rel=1e-5)


@pytest.mark.parametrize("loss", ["moment", "logistic"])
def test_the_reward_is_the_softplus_of_the_learners_mean_cost_minus_the_cost(loss):
    """A running mean over the learner's batches, here kept beside a cost that nobody shifts. Logistic: without it."""
    torch.manual_seed(0)
    args = hype.Args(cost_loss=loss, cost_lr=1e-3, cost_hidden_sizes=(16, 16))
    torch.set_default_dtype(torch.float64)
    cost, expert, learner, mean = hype.Cost(OBS, ACT, args), transitions(64), transitions(64, 1.0), 0.0
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


# --------------------------------------------------------------------------------- what the policy learns from
def test_the_methods_differ_in_what_their_names_say():
    for algo in hype.ALGOS.keys() - {"bc"}:
        args = settings(algo)
        assert (args.expert_ratio > 0) == ("hype" in algo) and (args.reset_prob > 0) == ("filter" in algo)
        assert (args.bc_coef > 0) == (algo == "bc-reg") and (args.cost_loss == "logistic") == (algo == "gail")


@pytest.mark.parametrize("algo, own, of_expert, cloned", [("hype", 8, 8, 0), ("mm", 16, 0, 0), ("bc-reg", 16, 0, 16)])
def test_what_a_batch_holds(algo, own, of_expert, cloned, shown, tmp_path, monkeypatch, no_evaluation):
    """Expert and learner transitions, all with rewards from the cost as it is now."""
    costs, marks, rewards, original = [], [], [], hype.sac_update

    class Cost(hype.Cost):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            costs.append(self)

    def watch(agent, batch, expert, noise, args):
        marks.append([key in shown for key in keys(batch.obs, batch.actions)])
        torch.testing.assert_close(batch.rewards, costs[0].reward(batch.obs, batch.actions))
        assert all(key in shown for key in keys(expert.obs, expert.actions)) and len(expert.obs) == cloned
        rewards.append(batch.rewards.mean().item())
        return original(agent, batch, expert, noise, args)

    monkeypatch.setattr(hype, "Cost", Cost)
    monkeypatch.setattr(hype, "sac_update", watch)
    hype.train(settings(algo, total_timesteps=100, cost_lr=0.01, run_dir=str(tmp_path)))
    assert marks == [[False] * own + [True] * of_expert] * 41 and np.std(rewards) > 0.01


def test_cloning_takes_no_steps_and_executes_what_was_shown(tmp_path, monkeypatch):
    """Demonstrations in a fifth of the bounds: what is executed is in the environment's own unit."""
    pointmass.write_demos(tmp_path / "narrow.npz", episodes=40)
    data = dict(np.load(tmp_path / "narrow.npz"))
    data["actions"] = np.clip(data["actions"], -0.4, 0.4)
    np.savez(tmp_path / "narrow.npz", **data)
    executed, original = [], pointmass.PointMass.step

    def step(self, action):
        executed.append(action)
        return original(self, action)

    monkeypatch.setattr(pointmass.PointMass, "step", step)
    others = dict(env_id="tests.pointmass:PointMass-v0", demos=str(tmp_path / "narrow.npz"), num_demos=40)
    others |= dict(hidden_sizes=(32, 32), batch_size=64, actor_lr=3e-3, eval_episodes=1)
    others |= dict(total_timesteps=1_000, eval_every=1_000)
    rows = hype.train(settings("bc", **others, run_dir=str(tmp_path / "run")))
    assert len(executed) == sum(row["eval_length_mean"] for row in rows)  # an episode at the start, one at the end
    assert [(row["env_steps"], row["updates"]) for row in rows] == [(0, 0), (0, 1_000)]
    policy, env = torch.load(tmp_path / "run/policy.pt"), hype.make_env("tests.pointmass:PointMass-v0")
    actor = hype.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    for obs in data["observations"][:200:5]:
        env.reset()
        env.step(actor.act(obs, deterministic=True))
    asked, done = data["actions"][:200:5], np.array(executed[-40:])
    assert (done * asked).sum() / (asked**2).sum() == pytest.approx(1, abs=0.15)


# ------------------------------------------------------------------------------------ FILTER: resets to expert states
def test_resets_continue_the_demonstration_to_the_last_bit():
    """The simulator's state, the observation, the steps left and what the demonstrated actions lead to."""
    env, data, states = hype.make_env("Hopper-v4"), dict(np.load(HOPPER)), hype.load_states(HOPPER, 2)
    assert len(states) == 500
    for seed in range(2):
        torch.manual_seed(seed)
        obs, from_expert = hype.reset(env, states, 1.0)
        (row,), truncated = np.flatnonzero((data["observations"] == obs).all(1)), False
        assert from_expert and row < 2_000 and row % 4 == 0
        np.testing.assert_array_equal(simulator_state(env), states[row // 4])
        for t in range(row, row + 1_000 - row % 1_000):
            assert not truncated
            obs, _, terminated, truncated, _ = env.step(data["actions"][t])
            np.testing.assert_array_equal(obs, data["next_observations"][t])
        assert truncated and not terminated
    assert len({hype.reset(env, states, 1.0)[0].tobytes() for _ in range(50)}) > 40


def test_states_of_episodes_of_different_lengths(tmp_path):
    """Of 601, 1,000 and 399 steps; the first two are used."""
    data = dict(np.load(HOPPER))
    parts = [np.arange(601), np.arange(1_000, 2_000), np.arange(2_000, 2_399)]
    states = data["states"][np.concatenate([rows[::4] // 4 for rows in parts])]
    cut = {name: data[name][np.concatenate(parts)] for name in data if name not in ("states", "metadata")}
    cut["truncations"][[600, 1_600, 1_999]] = 1
    np.savez(tmp_path / "cut.npz", **cut, states=states)
    np.testing.assert_array_equal(hype.load_states(str(tmp_path / "cut.npz"), 2), states[: 151 + 250])


def test_resets_have_their_probability():
    env, states, elapsed = hype.make_env("Hopper-v4"), hype.load_states(HOPPER, 10), []
    torch.manual_seed(0)
    for _ in range(400):
        _, from_expert = hype.reset(env, states, 0.3)
        elapsed.append(env.get_wrapper_attr("_elapsed_steps"))
        assert from_expert or elapsed[-1] == 0
    hits = [steps for steps in elapsed if steps]
    assert 80 < len(hits) < 160 and 400 < np.mean(hits) < 600  # 120 +- 9, 498 +- 26


def test_demonstrations_without_states_are_refused(tmp_path):
    data = {name: value for name, value in np.load(HOPPER).items() if name != "states"}
    np.savez(tmp_path / "bare.npz", **data)
    with pytest.raises(SystemExit, match=r"bare\.npz has no simulator states"):
        hype.train(settings("filter", demos=str(tmp_path / "bare.npz"), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_cost_sees_no_episode_that_started_at_an_expert_state(tmp_path, monkeypatch, no_evaluation):
    """The policy sees them all, and every step is counted."""
    taken, judged, batches, steps = [], [], [], []
    step, reset = gym.envs.mujoco.hopper_v4.HopperEnv.step, hype.reset
    updates = hype.cost_update, hype.sac_update

    def watch_reset(*inputs):
        obs, from_expert = reset(*inputs)
        taken.append((from_expert, []))
        return obs, from_expert

    class Buffer(hype.ReplayBuffer):
        def add(self, *transition):
            taken[-1][1].extend(keys([transition[0]], [transition[1]]))
            super().add(*transition)

    def watch_cost(cost, expert, learner, mix, args):
        judged.extend(keys(learner.obs, learner.actions))
        return updates[0](cost, expert, learner, mix, args)

    def watch_policy(agent, batch, expert, noise, args):
        batches.extend(keys(batch.obs, batch.actions))
        return updates[1](agent, batch, expert, noise, args)

    def count(self, action):
        steps.append(action)
        return step(self, action)

    monkeypatch.setattr(gym.envs.mujoco.hopper_v4.HopperEnv, "step", count)
    monkeypatch.setattr(hype, "reset", watch_reset)
    monkeypatch.setattr(hype, "ReplayBuffer", Buffer)
    monkeypatch.setattr(hype, "cost_update", watch_cost)
    monkeypatch.setattr(hype, "sac_update", watch_policy)
    rows = hype.train(settings("filter", total_timesteps=300, run_dir=str(tmp_path)))
    own = {key for from_expert, episode in taken for key in episode if not from_expert}
    other = {key for from_expert, episode in taken for key in episode if from_expert}
    assert judged and own >= set(judged) and not other & set(judged) and other & set(batches) and own & set(batches)
    assert rows[-1]["env_steps"] == 300 == len(steps) == len(own) + len(other)
