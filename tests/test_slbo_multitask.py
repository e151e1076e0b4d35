"""slbo_multitask.py: tasks, their rewards in the simulator, the ledger of real steps, and what is carried over."""

import json
import math
from dataclasses import replace
from functools import partial

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

import slbo_multitask as multi
from tests import pointmass
from tests.conftest import run
from tests.test_scripts import COMMANDS


class Goals(pointmass.PointMass):
    """A point mass with a place to go to; nothing ends an episode."""

    task = (0.0, 0.0)

    def draw_task(self, rng):
        return tuple(rng.uniform(-1, 1, 2).tolist())

    def step(self, action):
        before = torch.tensor(self.state)
        obs, *_ = super().step(action)
        reward = self.reward(before, torch.as_tensor(action), torch.tensor(obs))
        return obs, float(reward), False, False, {}

    def terminates(self, next_obs):
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)

    def reward(self, obs, actions, next_obs):
        return 1 - (next_obs[..., :2] - torch.tensor(self.task)).norm(dim=-1)


gym.register("Goals-v0", entry_point=Goals, max_episode_steps=50, disable_env_checker=True)
TINY = multi.Args(
    env_id="Goals-v0", device="cpu", compile="off", hidden_sizes=(5,), value_hidden_sizes=(16,), model_hidden_sizes=(8,)
)
SMALL = dict(total_timesteps=180, stage_steps=60, eval_every=60, eval_episodes=1, warm_up_rounds=2, test_rounds=3)
SMALL |= dict(model_updates=3, policy_updates=2, virtual_envs=4, virtual_steps=10, value_epochs=1, held_out_tasks=2)
SMALL |= dict(test_after=(1, 3), test_stages=2, batch_tasks=3, checkpoint_every=1)


# ------------------------------------------------------------------------------------------------------ tasks
REWARD = {  # of the centre of mass's velocity, the squared norm of actions as shares of their greatest, and the task
    "HCFB": lambda v, u, g: g[0] * v[0] - 0.05 * u,
    "HCF": lambda v, u, g: -abs(v[0] - g[0]) - 0.05 * u,
    "HCP": lambda v, u, g: -abs(v[0] - g[0]) - 0.05 * u,
    "AFB": lambda v, u, g: g[0] * v[0] + 0.05 - 0.005 * u,
    "AF": lambda v, u, g: -abs(v[0] - g[0]) + 1 + 0.05 - 0.005 * u,
    "AD": lambda v, u, g: -abs(v[0] - g[0]) - abs(v[1] - g[1]) + 2 + 0.05 - 0.005 * u,
}
BOUND = dict(HCF=0, HCP=0, AF=1.05, AD=2.05)  # of a step's reward
RANGES = dict(HCFB=(-1, 1), HCF=(-2, 2), HCP=(0, 2), AFB=(-1, 1), AF=(-3, 3), AD=(-3, 3))


@pytest.mark.parametrize("family", REWARD)
def test_tasks_are_reproducible_disjoint_and_over_the_whole_range(family):
    env, low, high = multi.make_env(f"{family}-v0"), *RANGES[family]
    train, held_out, other = (
        [multi.draw_task(env, seed, held_out, i) for i in range(100)] for seed, held_out in ((1, 0), (1, 1), (2, 0))
    )
    assert train == [multi.draw_task(multi.make_env(f"{family}-v0"), 1, False, i) for i in range(100)]
    assert train != held_out and train != other and {len(task) for task in train} == {2 if family == "AD" else 1}
    values = np.array(train)
    assert low <= values.min() < low + 0.2 * (high - low) and high >= values.max() > high - 0.2 * (high - low)
    if family in ("HCFB", "AFB"):
        assert {task[0] for task in train} == {task[0] for task in held_out} == {-1.0, 1.0}
    else:
        assert not set(train) & set(held_out)


@pytest.mark.parametrize("family", REWARD)
def test_a_familys_reward_is_that_of_the_simulators_own_centre_of_mass(family):
    """Real and virtual rewards both follow a change of the task."""
    env = multi.make_env(f"{family}-v0")
    known, rng, (obs, _) = multi.KnownTask(env, "cpu"), np.random.default_rng(0), env.reset(seed=0)
    model, other, rewards = env.unwrapped.model, mujoco.MjData(env.unwrapped.model), []
    for t in range(300):
        if t % 50 == 0:
            task = multi.draw_task(env, 0, False, t)
            multi.set_task((env,), task)
        action = rng.uniform(-1.3, 1.3, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        other.qpos[:], other.qvel[:] = env.unwrapped.data.qpos, env.unwrapped.data.qvel
        mujoco.mj_forward(model, other)
        mujoco.mj_subtreeVel(model, other)
        velocity = other.body("torso").subtree_linvel
        expected = REWARD[family](velocity, (action.clip(-1, 1) ** 2).sum(), task)
        assert reward == pytest.approx(expected, abs=1e-5) and reward <= BOUND.get(family, math.inf)
        tensors = [torch.tensor(x)[None] for x in (obs, action, next_obs)]
        assert float(known.reward(*tensors)) == pytest.approx(reward, abs=1e-4)
        assert terminated == (family[0] == "A" and not 0.2 <= other.qpos[2] <= 1)
        assert known.terminates(tensors[2]).tolist() == [terminated]
        rewards.append(reward)
        obs = env.reset(seed=t)[0] if terminated or truncated else next_obs


def test_who_is_told_sees_the_task_in_front():
    env, told = multi.make_env("AD-v0"), multi.make_env("ADTold-v0")
    multi.set_task((env, told), (1.5, -0.5))
    np.testing.assert_allclose(told.reset(seed=3)[0], [1.5, -0.5, *env.reset(seed=3)[0]])
    action = np.full(8, 0.3, np.float32)
    (obs, reward, *_), (more, same, *_) = env.step(action), told.step(action)
    np.testing.assert_allclose(more, [1.5, -0.5, *obs])
    assert same == reward


# ----------------------------------------------------------------------------------------------------- a new task
def test_a_new_policy_is_fresh_and_nothing_else_is():
    actor, value, dynamics = multi.Actor(4, 2, (5,)), multi.Value(4, TINY), multi.DeltaMLP(4, 2, TINY)
    multi.remember((actor, value, dynamics), None, multi.Steps(*torch.randn(6, 50, 4)), TINY)
    actor.log_std.data += 1
    value.optimizer.step([torch.ones_like(p) for p in value.optimizer.params])
    before = {name: [x.clone() for x in multi.contents(net)] for name, net in (("a", actor), ("d", dynamics))}
    kept, normaliser = list(actor.parameters()), actor.normalise.mean.clone()
    old_value = [param.clone() for param in value.parameters()]
    multi.begin_anew(actor, value, TINY)
    assert all(map(torch.equal, before["d"], multi.contents(dynamics)))
    assert torch.equal(actor.normalise.mean, normaliser) and actor.normalise.count == 50 and not actor.log_std.any()
    assert value.optimizer.t == 0 and not torch.equal(old_value[0], next(value.parameters()))
    assert not torch.equal(actor.net.weights[0], before["a"][1])
    assert all(a is b for a, b in zip(kept, actor.parameters(), strict=True))


class Counted(gym.Wrapper):
    """Notes how many steps were taken, and with which task."""

    def __init__(self, env):
        super().__init__(env)
        self.taken = []

    def step(self, action):
        self.taken.append(self.unwrapped.task)
        return self.env.step(action)


@pytest.fixture
def envs(monkeypatch) -> list[Counted]:
    """The training and the evaluation environment of each run that follows."""
    found, make_env = [], multi.make_env
    monkeypatch.setattr(multi, "make_env", lambda env_id: found.append(Counted(make_env(env_id))) or found[-1])
    return found


def test_the_ledger(envs, monkeypatch, tmp_path):
    """Every real step belongs to a task; warm-up takes none; held-out tasks take theirs after the last test alone."""
    spent, rounds = [], multi.slbo_rounds

    def counted(n, *inputs):
        before = len(envs[0].taken)
        result = rounds(n, *inputs)
        spent.append((n, before, len(envs[0].taken) - before))
        return result

    monkeypatch.setattr(multi, "slbo_rounds", counted)
    rows = multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path / "run")))
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    train, held_out = ([tuple(task) for task in about[name]] for name in ("train_tasks", "held_out_tasks"))
    assert len(train) == 3 and len(held_out) == 2
    expected = [task for task in train for _ in range(60)] + [task for task in held_out for _ in range(120)]
    assert envs[0].taken == expected
    assert [row["env_steps"] for row in rows] == [0, 60, 120, 420]
    assert [row["test_steps"] for row in rows] == [0, 0, 0, 240]
    assert [row["train_steps"] for row in rows] == [0, 60, 120, 180]
    assert [x for x in spent if x[0]] == [
        *[(2, 60, 0), (2, 60, 0)],  # after one task: zero-shot on two held-out tasks; then
        *[(2, 60, 0), (2, 120, 0)],  # warm-up of the second and third task; the first has none
        *[(2, 180, 0), (3, 240, 0), (3, 300, 0)],  # a held-out task: zero-shot, two stages
        *[(2, 300, 0), (3, 360, 0), (3, 420, 0)],
    ]
    assert {name for name in rows[1] if name.startswith("test/")} == {
        f"test/{x}after_0" for x in ("", "task_0_", "task_1_")
    }
    assert rows[3]["test/after_120"] == pytest.approx(
        (rows[3]["test/task_0_after_120"] + rows[3]["test/task_1_after_120"]) / 2
    )


@pytest.mark.parametrize("algo,steps", [("scratch", [120, 120]), ("goal-conditioned", [60] * 3 + [120, 120])])
def test_the_ledger_of_the_baselines(algo, steps, envs, tmp_path, monkeypatch):
    told = partial(pointmass.gym.register, max_episode_steps=50, disable_env_checker=True)
    if "GoalsTold-v0" not in gym.registry:
        import envs.multitask as families

        told("GoalsTold-v0", families.told, kwargs=dict(robot=Goals))
    update, normalised = multi.policy_update, []
    monkeypatch.setattr(
        multi,
        "policy_update",
        lambda actor, *rest: normalised.append(int(actor.normalise.count)) or update(actor, *rest),
    )
    rows = multi.train(replace(TINY, **SMALL, algo=algo, run_dir=str(tmp_path / "run")))
    assert rows[-1]["env_steps"] == sum(steps) == len(envs[0].taken)
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    assert envs[0].taken[-120:] == [tuple(about["held_out_tasks"][1])] * 120
    if algo == "goal-conditioned":
        assert envs[0].taken[:180] == [tuple(task) for task in about["train_tasks"] for _ in range(20)]
        assert normalised == [0, 60, 120, 180, 240, 180, 240]  # before the update's own steps: of the policy that acted


def test_a_held_out_task_changes_nothing(tmp_path, monkeypatch):
    """Not even when it adapts: each begins from the same networks, buffer and generator."""
    seen, trial = [], multi.try_held_out

    def noted(index, stages, networks, updates, replay, *rest):
        def look():
            parts = [x.clone() for net in networks for x in multi.contents(net)]
            return [*parts, *(x.clone() for x in replay or ()), torch.get_rng_state()]

        before, parameters = look(), [id(p) for net in networks for p in net.parameters()]
        returns = trial(index, stages, networks, updates, replay, *rest)
        seen.append((stages, before))
        assert all(map(torch.equal, before, look()))
        assert parameters == [id(p) for net in networks for p in net.parameters()]
        return returns

    monkeypatch.setattr(multi, "try_held_out", noted)
    rows = multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path / "run")))
    assert [stages for stages, _ in seen] == [0, 0, 2, 2] and len({row["test/after_0"] for row in rows[1::2]}) == 2
    for (_, first), (_, second) in (seen[:2], seen[2:]):
        assert all(map(torch.equal, first, second))
    untested = multi.train(replace(TINY, **SMALL | dict(test_after=()), run_dir=str(tmp_path / "untested")))
    same = [name for name in untested[-1] if name not in ("env_steps", "test_steps", "wall_time_s")]
    assert [[row.get(name) for name in same] for row in rows] == [[row.get(name) for name in same] for row in untested]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    return multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path_factory.mktemp("whole"))))


@pytest.mark.parametrize("saves", [1, 2, 4, 6])
def test_a_run_that_stops_at_any_checkpoint_goes_on_exactly(saves, whole, tmp_path, monkeypatch):
    """Also between held-out tasks (2 and 6). `test_scripts.py` kills whole processes."""
    save, count = multi.save_checkpoint, []

    def stopping(*inputs):
        save(*inputs)
        count.append(1)
        if len(count) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(multi, "save_checkpoint", stopping)
        with pytest.raises(KeyboardInterrupt):
            multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path / "stopped")))
    rows = multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path / "stopped")))
    assert str([row | dict(wall_time_s=0) for row in rows]) == str([row | dict(wall_time_s=0) for row in whole])


def test_zero_shot_rises_with_the_number_of_tasks(tmp_path):
    """Places of a point mass: a model of three tasks' data knows how to go there; one of less does not."""
    words = dict(total_timesteps=750, stage_steps=250, eval_every=1_000, warm_up_rounds=4, model_updates=60)
    words |= dict(policy_updates=6, virtual_envs=40, virtual_steps=25, gamma=0.9, max_kl=0.03, held_out_tasks=2)
    words |= dict(test_after=(0, 1, 3), test_stages=0, hidden_sizes=(32, 32), value_hidden_sizes=(64, 64))
    args = replace(TINY, **words, model_hidden_sizes=(32, 32), eval_episodes=5, run_dir=str(tmp_path / "run"))
    zero, one, three = [row["test/after_0"] for row in multi.train(args) if "test/after_0" in row]
    assert max(zero, one) < 20 and three > 35


# ------------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    "words,message",
    [
        ("--total-timesteps 100", "is no multiple of --stage-steps 30"),
    ],
)
def test_what_will_not_do_is_said_before_the_run(words, message, tmp_path):
    with pytest.raises(SystemExit, match=rf"^slbo_multitask\.py: .*{message}"):
        run("slbo_multitask", f"{COMMANDS['slbo_multitask']} {words}", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_not_the_environments_stops_the_run(tmp_path, monkeypatch):
    check = multi.KnownTask.reward
    monkeypatch.setattr(multi.KnownTask, "reward", lambda self, *x: check(self, *x) + 0.001)
    with pytest.raises(SystemExit, match=r"^slbo_multitask\.py: .*reward is wrong by up to 0.001"):
        multi.train(replace(TINY, **SMALL, run_dir=str(tmp_path / "run")))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_checkpoint(tmp_path, monkeypatch):
    update, calls = multi.value_update, []

    def breaking(*inputs):
        calls.append(1)
        return update(*inputs) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(multi, "value_update", breaking)
    with pytest.raises(SystemExit, match=r"^slbo_multitask\.py: a loss is not finite at step 120: .*losses/value.*nan"):
        multi.train(replace(TINY, **SMALL | dict(test_after=()), run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "checkpoint.pt").exists()
