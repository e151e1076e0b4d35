"""Wrong data and wrong worlds: each is refused in a line that says what was found, or does what it should."""

import importlib
import json
import re
import sys
import threading
from itertools import product
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import evaluate
import hyper
import sac
import sac_eo
from demos import from_d4rl
from tests import pointmass
from tests.conftest import POINT, ROOT, run
from tests.test_scripts import COMMANDS


# ------------------------------------------------------------------------------------------------ worlds
class Strange(pointmass.PointMass):
    """Rewards and successes as arrays and None, an action bound that float32 cannot hold."""

    low, high = np.float32([0.015086432, -1]), np.float32([0.022543658, 1])
    action_space = gym.spaces.Box(low, high)

    def step(self, action):
        assert (action >= self.low).all() and (action <= self.high).all()
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, np.array([reward]), terminated, truncated, {"is_success": None}


class Secretive(pointmass.PointMass):
    """Starts where a generator of its own says."""

    generator = None

    def reset(self, seed=None, options=None):
        self.generator = self.generator or np.random.default_rng(0)
        return super().reset(seed=int(self.generator.integers(1_000)))


class Breaking(pointmass.PointMass):
    steps = 0

    def step(self, action):
        Breaking.steps += 1
        if Breaking.steps == 160:
            raise RuntimeError("the simulator broke")
        return super().step(action)


class Late(pointmass.PointMass):
    """Ends after five steps. Says is_success in the last step alone, and only where there was one."""

    def reset(self, seed=None, options=None):
        self.infos = [{"is_success": np.array([True])} if seed % 2 == 0 else {}, *4 * [{}]]
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *_ = super().step(action)
        info = self.infos.pop()
        return obs, reward, not self.infos, False, info


for env in (Strange, Secretive, Breaking, Late):
    gym.register(f"{env.__name__}-v0", entry_point=env, max_episode_steps=50, disable_env_checker=True)
gym.register("Endless-v0", entry_point=pointmass.PointMass, disable_env_checker=True)
HERE = "tests.test_faults"


def complaint(script: str, words: str, folder) -> str:
    """What the user reads. No run has begun."""
    with pytest.raises(SystemExit) as stopped:
        run(script, words, folder)
    message = str(stopped.value)
    assert message.startswith(f"{script}.py: ") and len(message.splitlines()) == 1 and not (folder / "run").exists()
    return message


@pytest.mark.parametrize(
    "script,words,expected",
    [
        ("sac", "--env-id tests.pointmass:Discrete-v0", r"Discrete-v0 needs a vector of actions"),
        ("sac", f"--env-id {HERE}:Endless-v0", r"Endless-v0 needs .* a time limit \(max_episode_steps\)"),
        ("hyper", "--env-id tests.pointmass:Lawless-v0 --demos DEMOS --num-demos 5", r"Lawless-v0 end\? Give it `t"),
        ("mbarl", f"--env-id {POINT}", r"PointMass-v0 has no goals, .* docs/mbarl.md shows a world"),
        ("mbarl_offline", "--env-id envs.tabletop:Tabletop-v0", r"no uniform_states\(n, rng\); take PointMass2D-v0"),
        ("sra_offline", f"{COMMANDS['sra_offline']} --num-imagined 1", r"nothing is imagined; give fewer --warmup"),
        ("vins", "--algo bc --rl-after 0", r"--rl-after needs learned values and a learned model, not --algo bc"),
    ],
)
def test_a_world_that_will_not_do(script, words, expected, demos, tmp_path):
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    message = complaint(script, words.replace("DEMOS", demos), tmp_path)
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    "rule",
    [
        lambda s: (s[:, :2].abs() > 2).any(-1).long(),
        lambda s: (s[:, :2].abs() > 2).any(-1, keepdim=True),
        lambda s: s[:, 0] > -9,
    ],
)
def test_a_rule_of_termination_is_bool_and_agrees_with_the_demonstrations(rule, demos, tmp_path, monkeypatch):
    monkeypatch.setattr(pointmass.PointMass, "terminates", lambda self, next_obs: rule(next_obs))
    words = f"{COMMANDS['hyper']} --env-id {POINT} --demos {demos}"
    assert "must be bool [n] and agree" in complaint("hyper", words, tmp_path)


def test_observations_are_copies_actions_stay_in_bounds_and_success_is_none_or_comes_late():
    env = sac.make_env(POINT)
    obs, _ = env.reset(seed=0)
    assert not np.array_equal(obs, env.step(np.float32([1, 1]))[0])
    env, actor = sac.make_env(f"{HERE}:Strange-v0"), sac.Actor(4, 2, (8,))
    env.reset(seed=0)
    assert all(type(env.step(action)[1]) is float for action in np.float32([[1, 1], [-1, -1], [0.3, 0.7]]))
    strange = sac.evaluate(actor, env, 2, seed=0)
    assert np.isnan(strange["eval_success_rate"]) and np.isfinite(strange["eval_return_mean"])
    assert sac.evaluate(actor, sac.make_env(f"{HERE}:Late-v0"), 4, seed=0)["eval_success_rate"] == 0.5


# ------------------------------------------------------------------------------------------------ data
def write(path, data: dict, **about) -> str:
    np.savez(path, **data, **({"metadata": json.dumps(about)} if about else {}))
    return str(path)


def columns(data: dict, rows) -> dict:
    return {name: column[rows] for name, column in data.items()}


def shifted(data: dict) -> dict:
    return data | dict(next_observations=np.roll(data["observations"], -1, 0))


WRONG = {  # what is done to a good file, metadata, the complaint
    "another robot's": (lambda d: d, dict(env_id="Walker2d-v5"), "recorded in Walker2d, not in PointMass"),
    "shifted": (shifted, {}, "next_observations of the next trajectory"),
    "running on": (lambda d: columns(shifted(d), slice(-1)), {}, "next_observations of the next trajectory"),
    "subsampled": (lambda d: columns(d, slice(1, None, 2)), {}, "lacks rows"),
    "time limits as terminations": (
        lambda d: d | dict(terminations=d["truncations"], truncations=d["terminations"]),
        *({}, "terminates a trajectory at the time limit"),
    ),
    "actions in [-1, 1]": (lambda d: d | dict(actions=d["actions"] / 2.01), {}, "all in half"),
    "actions in degrees": (lambda d: d | dict(actions=d["actions"] * 57), {}, "beyond the bounds"),
    "not finite": (lambda d: d | dict(rewards=d["rewards"] * np.nan), {}, "not finite"),
    "two columns": (lambda d: d | dict(observations=d["observations"][:, :2]), {}, "cannot reshape"),
    "empty": (lambda d: columns(d, slice(0)), {}, "cannot reshape array of size 0"),
    "no rewards": (lambda d: {name: d[name] for name in d if name != "rewards"}, {}, "rewards is not a file"),
    "too few": (lambda d: columns(d, slice(120)), {}, "has 2 marked ends of trajectories"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused(what, demos, tmp_path):
    (change, about, expected), good = WRONG[what], dict(np.load(demos))
    path = write(tmp_path / "wrong.npz", change(good), **about)
    with pytest.raises(SystemExit, match=expected):
        hyper.load_demos(path, hyper.make_env(POINT), 5, 1, "cpu")
    if what not in ("two columns", "empty", "no rewards", "too few"):  # the way out
        path = write(tmp_path / "meant.npz", change(good), **about, checked=True)
        hyper.load_demos(path, hyper.make_env(POINT), 0, 1, "cpu")


@pytest.mark.parametrize("kind", ["hdf5", "pickle", "npy", "missing"])
def test_a_file_of_another_format_is_named(kind, tmp_path):
    path = tmp_path / "demos.npz"
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind != "missing":
        path.write_bytes(dict(hdf5=b"\x89HDF\r\n\x1a\n", pickle=b"\x80\x04N.")[kind])
    with pytest.raises(SystemExit, match=r"^hyper\.py: .*demos\.npz is no \.npz as in demos/README\.md \(has conv"):
        hyper.load_demos(str(path), hyper.make_env(POINT), 5, 1, "cpu")


IMITATORS = [script for script in COMMANDS if "--num-demos" in COMMANDS[script] and script not in ("mbarl", "vins")]


@pytest.mark.parametrize("script", IMITATORS)
def test_every_script_reads_with_suspicion(script, demos, tmp_path):
    words = f"--env-id {POINT}" + (f" --offline-data {demos}" if "offline" in script else "")
    assert f"{tmp_path}/no.npz" in complaint(script, f"{words} --demos {tmp_path}/no.npz", tmp_path)
    assert "has 5 marked ends of trajectories" in complaint(script, f"{words} --demos {demos} --num-demos 6", tmp_path)
    shift = write(tmp_path / "shift.npz", shifted(dict(np.load(demos))))
    assert "of the next trajectory" in complaint(script, f"{words} --demos {shift} --num-demos 5", tmp_path)


def test_what_is_read_are_whole_trajectories_subsampled_and_actions_where_they_are_needed(demos, tmp_path):
    env, data = hyper.make_env(POINT), dict(np.load(demos))
    whole, ends, returns = hyper.load_demos(write(tmp_path / "part.npz", columns(data, slice(230))), env, 0, 1, "cpu")
    assert len(whole.obs) == 200 and ends.tolist() == [50, 100, 150, 200]  # a trailing part is left out
    assert returns == pytest.approx([data["rewards"][i : i + 50].sum() for i in range(0, 200, 50)])
    hyper.load_demos(write(tmp_path / "one.npz", columns(data, slice(50))), env, 1, 1, "cpu")
    few, same_ends, same_returns = hyper.load_demos(demos, env, 4, 20, "cpu")
    assert (same_returns == returns).all() and (same_ends == ends).all()
    assert all(torch.equal(part, column[::20]) for part, column in zip(few, whole, strict=True))
    path = write(tmp_path / "wide.npz", data | dict(actions=np.zeros((len(data["rewards"]), 9))))
    batch, *_ = sac_eo.load_demos(path, env, 5, 1, "cpu", actions=False)
    np.testing.assert_array_equal(batch.obs, data["observations"])
    with pytest.raises(SystemExit, match="cannot reshape"):
        hyper.load_demos(path, env, 5, 1, "cpu")


# ------------------------------------------------------------------------------------------------ runs
SAC = f"{COMMANDS['sac']} --total-timesteps 300 --checkpoint-every 60 --env-id"


def test_a_world_with_state_of_its_own_is_noticed_when_a_run_goes_on(tmp_path, capsys):
    for world, continued in product((f"{HERE}:Secretive-v0", POINT), (False, True)):
        run("sac", f"{SAC} {world}", tmp_path, world.replace(":", ""))
        noticed = "keeps state that no reset restores" in capsys.readouterr().out
        assert noticed == (continued and world != POINT)


def test_an_environment_that_breaks_leaves_a_checkpoint_and_its_own_traceback(tmp_path):
    words = f"{SAC} {HERE}:Breaking-v0 --eval-every 1000 --eval-episodes 1"
    with pytest.raises(RuntimeError, match="the simulator broke"):
        run("sac", words, tmp_path)
    assert (tmp_path / "run" / "checkpoint.pt").exists() and len(run("sac", words, tmp_path)) == 2


def test_a_run_in_a_thread(tmp_path):
    result = []
    args = sac.Args(env_id=POINT, total_timesteps=100, learning_starts=50, run_dir=str(tmp_path / "run"))
    thread = threading.Thread(target=lambda: result.extend(sac.train(args)))
    thread.start()
    thread.join()
    assert [row["env_steps"] for row in result] == [0, 100]


def test_two_runs_never_share_a_folder_and_tracking_without_wandb_makes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sac.time, "time", lambda: 1.0)
    sac.open_run(sac.Args())
    with pytest.raises(FileExistsError):
        sac.open_run(sac.Args())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError):
        sac.open_run(sac.Args(track=True, run_dir="run"))
    assert not Path("run").exists()


def test_episodes_that_end_in_success_are_recorded_from_where_training_never_starts(tmp_path):
    policy = dict(actor=sac.Actor(4, 2, (8,)).state_dict(), sizes=(4, 2, (8,)), script="sac", env_id=f"{HERE}:Late-v0")
    torch.save(policy, tmp_path / "policy.pt")
    evaluate.main(evaluate.Args(tmp_path, episodes=4, record=tmp_path / "record.npz"))
    assert np.load(tmp_path / "record.npz")["terminations"].tolist() == 4 * [0, 0, 0, 0, 1]
    assert evaluate.Args(Path()).seed >= 2**31 > hash((2**63, 10**9)) % 2**31


@pytest.mark.parametrize("script", [x for x in COMMANDS if x not in ("mbarl", "bc", "vins", "maml", "slbo_multitask")])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_checkpoint(script, demos, tmp_path):
    """From step 160 on the step sizes are absurd; a loss is looked at every 100 steps and before each checkpoint."""
    words = f"{COMMANDS[script]} --env-id {POINT} --eval-every 1000 --checkpoint-every 1"
    words += f" --demos {demos} --num-demos 5" if script in IMITATORS else ""
    words += f" --offline-data {demos} --lr 1e30" if "offline" in script else ""
    words += " --value-lr 1e30" if script == "slbo" else ""
    late = "offline" not in script and script != "slbo"
    words += " --learning-starts 160 --actor-lr 1e30" if late else ""
    with pytest.raises(SystemExit, match=rf"^{script}\.py: a loss is not finite at step \d+: .*losses/.*nan"):
        run(script, words, tmp_path)
    if late:
        with pytest.MonkeyPatch.context() as patch:  # the checkpoint holds classes of the script that was run
            patch.setitem(sys.modules, "__main__", importlib.import_module(script))
            state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)
        assert 50 <= state["step"] < 200
        assert all(np.isfinite(float(value)) for name, value in state["metrics"].items() if "losses" in name)


# ------------------------------------------------------------------------------------------------ converters
@pytest.mark.parametrize("version", ["v0", "v2"])
def test_a_d4rl_file_is_what_the_environment_returned(version, tmp_path):
    env, steps = sac.make_env("Hopper-v4"), []
    env.action_space.seed(0)
    for seed in range(3):
        (obs, _), ends = env.reset(seed=seed), False
        while not ends:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward, next_obs, terminated, truncated))
            obs, ends = next_obs, terminated or truncated
    obs, actions, rewards, next_obs, terminals, timeouts = map(np.array, zip(*steps, strict=True))
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        names = dict(observations=obs, actions=actions, rewards=rewards, terminals=terminals, timeouts=timeouts)
        file.update(names | (dict(next_observations=next_obs) if version == "v2" else {}))
    from_d4rl.main(from_d4rl.Args(tmp_path / "d4rl.hdf5", tmp_path / "out.npz", "Hopper-v4", episodes=2))
    batch, _, returns = hyper.load_demos(str(tmp_path / "out.npz"), env, 2, 1, "cpu")
    ends = np.flatnonzero(terminals)[:2]
    rows_kept = np.delete(np.arange(ends[1] + 1), ends if version == "v0" else [])
    np.testing.assert_array_equal(batch.obs, obs[rows_kept])
    np.testing.assert_array_equal(batch.next_obs, next_obs[rows_kept])
    np.testing.assert_allclose(batch.actions, actions[rows_kept].clip(-1 + 1e-6, 1 - 1e-6), atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(batch.terminations), ends if version == "v2" else [])
    assert returns.mean() == pytest.approx(rewards[rows_kept].sum() / 2, rel=1e-5)
