"""Wrong input: one line on stderr, exit code 2, no traceback, no run folder."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import bco_baseline
import hype
import hyper
import sac
import sac_eo
from tests import pointmass
from tests.conftest import POINT, TINY_HYPER, TINY_SAC, run

ROOT = Path(__file__).parents[1]
HOPPER = ["--env-id", "Hopper-v4"]
P = "tests.pointmass:"

# script, command line, what the line must say
WRONG = [
    (sac, ["--env-id", "Hoper-v4"], r"Hoper-v4.*Nearest known: .*Hopper-v"),
    (sac, ["--env-id", "dm_control/walker-wlak-v0"], r"walker-wlak.*dm_control/walker-walk-v0"),
    (sac, ["--env-id", "no_such_module:Env-v0"], r"no_such_module"),
    (sac, ["--env-id", "CartPole-v1"], r"actions must be a vector with finite bounds, not Discrete\(2\)"),
    (sac, ["--env-id", P + "Discrete-v0"], r"not Discrete\(3\)"),
    (sac, ["--env-id", P + "Unbounded-v0"], r"finite bounds, not Box\(-inf, inf"),
    (sac, ["--env-id", P + "Image-v0"], r"observations must be a vector.*not Box\(0, 255, \(8, 8, 3\)"),
    (sac, [*HOPPER, "--total-timesteps", "0"], r"--total-timesteps must be positive, got 0"),
    (sac, [*HOPPER, "--total-timesteps", "5e3"], r"--total-timesteps.*5e3"),
    (sac, [*HOPPER, "--batch-size", "-3"], r"--batch-size must be positive, got -3"),
    (sac, [*HOPPER, "--gamma", "1.5"], r"--gamma must be between 0 and 1, got 1.5"),
    (sac, [*HOPPER, "--actor-lr", "nan"], r"--actor-lr must be finite, got nan"),
    (sac, ["--env-id", "walker-run"], r"Nearest known: dm_control/walker-run-v0"),
    (sac, ["--env-id", P + "PointMas-v0"], r"Nearest known: PointMass-v0"),
    (sac, [*HOPPER, "--hidden-sizes", "64", "0"], r"--hidden-sizes must be positive"),
    (sac, [*HOPPER, "--no-such-flag", "1"], r"--no-such-flag"),
    (sac, [*HOPPER, "--preset", "fast"], r"invalid choice 'fast' for argument '--preset'. Expected one of"),
    (sac, [*HOPPER, "--eval-only"], r"--eval-only and --checkpoint PATH go together"),
    (sac, ["--env-id", P + "Blind-v0", "--capture-video"], r"--capture-video: .*Blind-v0 cannot be rendered .*OSError: no display"),
    (sac, [*POINT, "--capture-video"], r"tests.pointmass:PointMass-v0: .*render_mode"),
    (sac, [*HOPPER, "--resume", "no/such/run"], r"no/such/run: not a run folder of sac.py \(No such file or directory\)"),
    (sac, ["--env-id", "Hopper"], r"--env-id Hopper: name the version too, as in Hopper-v5"),
    (hyper, ["--env-id", "Swimmer-v4"], r"Swimmer-v4.npz: no such file; give --demos PATH \(bundled demonstrations: Ant-v4, Half"),
    (hyper, ["--env-id", "Hopper-v5"], r"Hopper-v5.npz: no such file; give --demos PATH \(of another version: .*Hopper-v4.npz\)"),
    (hyper, [*HOPPER, "--num-demos", "11"], r"has 10 trajectories, --num-demos asks for 11"),
    (hyper, [*HOPPER, "--num-demos", "0"], r"--num-demos must be positive, got 0"),
    (hyper, [*HOPPER, "--demos", str(ROOT / "demos/Ant-v4.npz")], r"has 11-dim observations, the file has 27: recorded on Ant-v4\?"),
    (hyper, [*HOPPER, "--demos", "minari:no/such-v0"], r"minari:no/such-v0: cannot be loaded"),
    (hyper, [*HOPPER, "--model-elites", "9"], r"--model-elites 9: the ensemble has only 7 members"),
    (hyper, [*HOPPER, "--real-share", "0.8", "--expert-share", "0.8"], r"more than the whole batch"),
    (hyper, [*HOPPER, "--real-share", "0.5", "--expert-share", "0.5", "--batch-size", "255"], r"rounded shares .* more than the batch"),
    (hyper, [*HOPPER, "--total-timesteps", "900"], r"nothing is learned in the first 1000 \(--initial-steps\)"),
    (sac, [*HOPPER, "--total-timesteps", "900"], r"nothing is learned in the first 5000 \(--learning-starts\)"),
    (sac, [*HOPPER, "--record-level", "0.5"], r"--record-level goes with --record-demos"),
    (sac, [*HOPPER, "--record-sampled"], r"--record-sampled goes with --record-demos"),
    (sac, [*HOPPER, "--record-min-return", "9"], r"--record-min-return goes with --record-demos"),
    (hyper, [*HOPPER, "--bc-weight", "1", "--expert-share", "0"], r"no expert rows in the batch"),
    (hyper, [*HOPPER, "--expert-start-prob", "2"], r"--expert-start-prob must be between 0 and 1, got 2.0"),
    (hyper, [*HOPPER, "--termination", "no_such_module:f"], r"--termination no_such_module:f: No module named"),
    (hyper, [*HOPPER, "--cost-reduce", "median"], r"median.*--cost-reduce.*min.*mean.*max"),
    (hyper, [*HOPPER, "--rollout-schedule", "5", "5", "1", "2"], r"--rollout-schedule: epochs must increase"),
    (hype, [*HOPPER, "--algo", "airl"], r"invalid choice 'airl' for argument '--algo'. Expected one of"),
    (hype, [*HOPPER, "--hybrid-ratio", "0.2", "0.1"], r"--hybrid-ratio: one share, or r0 r1 t1 r2 t2"),
    (hype, [*HOPPER, "--hybrid-ratio", "1.2"], r"--hybrid-ratio: .* shares r up to 1"),
    (hype, [*HOPPER, "--hybrid-ratio", "0.2", "0.1", "9", "0.1", "3"], r"t1 and t2 must increase"),
    (hype, [*HOPPER, "--total-timesteps", "900"], r"nothing is learned in the first 1000 \(--initial-steps\)"),
    (hype, [*HOPPER, "--total-train-steps", "900"], r"--total-train-steps 900: nothing is learned in the first 1000"),
    (hype, [*HOPPER, "--algo", "filter", "--reset-prob", "1"], r"no episode is left for the cost"),
    (hype, [*HOPPER, "--algo", "gail", "--preset", "paper"], r"gail is not one of the paper's methods"),
    (hype, [*HOPPER, "--algo", "bc", "--reset-prob", "0.5"], r"--algo bc clones and does nothing else"),
    (hype, [*HOPPER, "--reset-prob", "2"], r"--reset-prob must be between 0 and 1, got 2.0"),
    (hype, [*HOPPER, "--lr-sawtooth", "5000"], r"--lr-sawtooth starts again .*: give --cost-every too"),
    (hype, [*HOPPER, "--cost-data", "rollout"], r"--cost-data rollout takes whole episodes .*: give --cost-every too"),
    (hyper, [*HOPPER, "--cost-data", "rollout"], r"--cost-data rollout takes whole episodes .*: give --cost-every too"),
    (hyper, [*POINT], r"demos/tests.pointmass-PointMass-v0.npz"),
]  # fmt: skip


def complaint(script, argv, capsys, tmp_path) -> str:
    """The one line that the user sees."""
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        run(script, [*argv, *(() if "--resume" in argv else ("--run-dir", folder))])
    assert stopped.value.code == 2 and not folder.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: ")
    return lines[0]


@pytest.mark.parametrize("script,argv,expected", WRONG, ids=lambda x: " ".join(x[-2:]) if isinstance(x, list) else "")
def test_wrong_input(script, argv, expected, capsys, tmp_path):
    import re

    line = complaint(script, argv, capsys, tmp_path)
    assert re.search(expected, line), line


SPOILED = {
    "not finite in row 3": lambda d: d["observations"].__setitem__((3, 1), np.nan),
    "rewards has a value that is not finite": lambda d: d["rewards"].__setitem__(0, np.inf),
    "no array 'truncations'": lambda d: d.pop("truncations"),
    r"actions must lie in the environment's bounds \[-2, 2\], they span": lambda d: d["actions"].__setitem__((5, 0), 2.5),
    "the last row must end an episode": lambda d: d["truncations"].__setitem__(-1, 0),
    r"rewards must have shape \(250,\), has \(249,\)": lambda d: d.update(rewards=d["rewards"][1:]),
    r"next_observations must have shape": lambda d: d.update(next_observations=d["next_observations"][:, 0]),
    r"recorded on Walker2d-v4, not on tests.pointmass:PointMass-v0": lambda d: d.update(metadata='{"env_id": "Walker2d-v4"}'),
    "metadata is not a JSON object": lambda d: d.update(metadata="{"),
    "has 2-dim actions, the file has 3: recorded in another": lambda d: d.update(actions=np.pad(d["actions"], ((0, 0), (0, 1)))),
}  # fmt: skip


@pytest.mark.parametrize("expected", SPOILED)
def test_wrong_demonstrations(expected, demos, capsys, tmp_path):
    import re

    data = dict(np.load(demos))
    SPOILED[expected](data)
    np.savez(tmp_path / "bad.npz", **data)
    line = complaint(hyper, [*POINT, "--demos", tmp_path / "bad.npz", "--num-demos", "5", "--termination", "none"], capsys, tmp_path)
    assert re.search(expected, line), line


def test_no_termination_rule_says_which_flag_to_give(demos, capsys, tmp_path):
    line = complaint(hyper, [*POINT, "--demos", demos, "--num-demos", "5"], capsys, tmp_path)
    assert "give --termination none|learned|module:function" in line


def test_compile_without_a_compiler(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--compile: needs a C++ compiler" in complaint(hyper, [*HOPPER, "--compile"], capsys, tmp_path)


def test_pickled_demonstrations_are_refused(capsys, tmp_path):
    np.savez(tmp_path / "evil.npz", observations=np.array([{}], dtype=object))
    assert "not a readable .npz" in complaint(hyper, [*POINT, "--demos", tmp_path / "evil.npz"], capsys, tmp_path)


@pytest.fixture
def finished(tmp_path):
    run(sac, [*POINT, *TINY_SAC, "--total-timesteps", "80", "--run-dir", tmp_path / "done"])
    return tmp_path / "done"


def test_changed_argument_on_resume(finished, capsys, tmp_path):
    line = complaint(sac, ["--resume", str(finished), "--gamma", "0.5"], capsys, tmp_path)
    assert "--gamma was 0.99 and cannot become 0.5" in line


def test_a_run_is_not_shortened(finished, capsys, tmp_path):
    line = complaint(sac, ["--resume", str(finished), "--total-timesteps", "70"], capsys, tmp_path)
    assert "--total-timesteps was 80 and cannot become 70" in line


def test_resume_of_a_run_that_lacks_a_setting(finished, capsys, tmp_path):
    """Of an older version of the script: today's default need not be what it ran with."""
    about = json.loads((finished / "args.json").read_text())
    del about["args"]["optimistic"]
    (finished / "args.json").write_text(json.dumps(about))
    assert "not a run folder of sac.py ('optimistic')" in complaint(sac, ["--resume", str(finished)], capsys, tmp_path)


def test_resume_of_a_run_without_a_checkpoint(finished, capsys, tmp_path):
    (finished / "checkpoint.pt").unlink()
    assert "stopped before its first checkpoint" in complaint(sac, ["--resume", str(finished)], capsys, tmp_path)


def test_a_mistake_in_the_users_environment_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_import.py").write_text("from math import no_such_name\n")
    (tmp_path / "broken_call.py").write_text(
        "import gymnasium as gym\n\ndef make():\n    return 3 + 'x'\n\ngym.register('Broken-v0', entry_point=make)\n"
    )
    with pytest.raises(ImportError, match="no_such_name"):
        sac.make_env("broken_import:Env-v0")
    with pytest.raises(TypeError, match=r"unsupported operand") as caught:
        sac.make_env("broken_call:Broken-v0")
    assert 'broken_call.py", line 4' in "".join(traceback.format_exception(caught.value))


def test_an_episode_that_never_ends(capsys):
    """Without a time limit the first evaluation would wait for ever."""

    class Endless(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1), {}

        def step(self, action):
            return np.zeros(1), 0.0, False, False, {}

    class Still:
        def act(self, obs):
            return np.zeros(1)

    with pytest.raises(SystemExit):
        sac.evaluate(Still(), Endless(), 1, [0])
    assert "register the environment with max_episode_steps" in capsys.readouterr().err


def test_resume_of_another_scripts_run(finished, capsys, tmp_path):
    assert "a run of sac.py, not of hyper.py" in complaint(hyper, ["--resume", str(finished)], capsys, tmp_path)


@pytest.mark.parametrize("changed", ["rewards", "observations"])
def test_resume_with_other_demonstrations(changed, capsys, tmp_path, hyper_point, demos):
    """They may have moved, not changed; what the run is about stays as it was."""
    run(hyper, [*hyper_point, "--total-timesteps", "70", "--run-dir", tmp_path / "run"])
    about = (tmp_path / "run" / "args.json").read_text()
    data = dict(np.load(demos))
    data[changed][0] += 1
    np.savez(tmp_path / "other.npz", **data)
    capsys.readouterr()
    line = complaint(hyper, ["--resume", str(tmp_path / "run"), "--demos", str(tmp_path / "other.npz")], capsys, tmp_path / "no")
    assert "are not those of the run" in line and (tmp_path / "run" / "args.json").read_text() == about


def test_recording_into_a_folder_that_is_not_there_is_noticed_before_training(capsys, tmp_path):
    assert "there is no folder" in complaint(sac, [*HOPPER, "--record-demos", tmp_path / "no" / "d.npz"], capsys, tmp_path)


def test_help_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        hyper.parse_args(["--env-id", "Hopper-v4", "--preset", "paper", "--help"])
    assert not stopped.value.code and "default: 755000" in " ".join(capsys.readouterr().out.split())


def test_unreadable_and_foreign_checkpoints(finished, capsys, tmp_path, hyper_point):
    checkpoint = finished / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in complaint(sac, ["--resume", str(finished)], capsys, tmp_path)
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    assert "written by another program" in complaint(sac, ["--resume", str(finished)], capsys, tmp_path)
    assert (finished / "progress.csv").exists()
    checkpoint.write_bytes(whole)
    line = complaint(
        sac, ["--eval-only", "--checkpoint", str(finished / "args.json"), *HOPPER, "--resume", str(finished)][:3], capsys, tmp_path
    )
    assert "not a readable checkpoint" in line


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02junk" * 9, None])
def test_a_broken_policy_file(content, capsys, tmp_path):
    path = tmp_path / "policy.pt"
    if content is not None:
        path.write_bytes(content)
    line = complaint(sac, ["--eval-only", "--checkpoint", str(path)], capsys, tmp_path)
    expected = f"{path}: no such file" if content is None else f"{path}: not a readable checkpoint ("
    assert expected in line and "weights_only" not in line


def test_a_policy_of_an_older_version(finished, capsys, tmp_path):
    policy = torch.load(finished / "policy.pt", weights_only=True)
    del policy["actor"]["normalise.mean"]
    torch.save(policy, tmp_path / "policy.pt")
    line = complaint(sac, ["--eval-only", "--checkpoint", str(tmp_path / "policy.pt")], capsys, tmp_path)
    assert "written by an older version of sac.py" in line


def test_an_action_that_is_not_finite_never_reaches_the_simulator(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sac.Actor, "act", lambda self, obs, generator=None: np.full(2, np.nan, np.float32))
    monkeypatch.setattr(sac, "evaluate", lambda *a, **k: dict(eval_return_mean=0.0))
    with pytest.raises(SystemExit):
        run(sac, [*POINT, *TINY_SAC, "--total-timesteps", "80", "--run-dir", tmp_path / "run"])
    assert "action is not finite at env step 60" in capsys.readouterr().err


def test_demonstrations_of_another_version_are_announced(capsys, tmp_path):
    env = hyper.make_env("Hopper-v5")
    hyper.load_demos(str(ROOT / "demos" / "Hopper-v4.npz"), "Hopper-v5", env, 1)
    assert "note: --demos" in capsys.readouterr().err
    hyper.load_demos(str(ROOT / "demos" / "Hopper-v4.npz"), "Hopper-v4", env, 1)
    assert not capsys.readouterr().err


def test_full_observations_are_cut_like_the_environments(tmp_path):
    data = dict(np.load(ROOT / "demos" / "Ant-v4.npz"))
    for name in ("observations", "next_observations"):
        data[name] = np.pad(data[name], ((0, 0), (0, 105 - 27)), constant_values=7)
    del data["metadata"]
    np.savez(tmp_path / "full.npz", **data)
    rows, _ = hyper.load_demos(str(tmp_path / "full.npz"), "Ant-v5", hyper.make_env("Ant-v5"), 1)
    assert rows.shape == (1_000, 27 + 8 + 27 + 2) and not (rows == 7).any()
    with pytest.raises(SystemExit):
        hyper.load_demos(str(tmp_path / "full.npz"), "Ant-v4", hyper.make_env("Ant-v4"), 1)


def test_policy_of_another_environment(finished, capsys):
    args = sac.parse_args(["--eval-only", "--checkpoint", str(finished / "policy.pt"), *HOPPER])
    with pytest.raises(SystemExit) as stopped:
        sac.evaluate_policy(args)
    assert stopped.value.code == 2
    assert "made for tests.pointmass:PointMass-v0 (4 observations, 2 actions); Hopper-v4 has 11 and 3" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten(finished, capsys):
    with pytest.raises(SystemExit):
        run(sac, [*POINT, *TINY_SAC, "--run-dir", finished])
    assert "holds a run already" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(finished, capsys, monkeypatch):
    before = (finished / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sac.os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        sac.write_atomically(finished / "checkpoint.pt", lambda file: file.write(b"half of"))
    assert stopped.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert (finished / "checkpoint.pt").read_bytes() == before and not list(finished.glob("*.tmp"))


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline])
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, argv_of, monkeypatch, capsys):
    """At step 100 a loss turns NaN: the run names it and leaves the checkpoint of step 80."""
    function, loss = ("bco_update", "losses/imitation") if script is bco_baseline else ("sac_update", "losses/critic")
    original = getattr(script, function)

    def poisoned(agent, *rest):
        metrics = original(agent, *rest)
        return {**metrics, loss: metrics[loss] * (torch.nan if poisoned.on else 1)}

    poisoned.on = False
    monkeypatch.setattr(script, function, poisoned)
    run(script, [*argv_of(script), "--total-timesteps", "80", "--eval-every", "500", "--run-dir", tmp_path])
    good = (tmp_path / "checkpoint.pt").read_bytes()
    poisoned.on = True
    with pytest.raises(SystemExit) as stopped:
        run(script, ["--resume", tmp_path, "--total-timesteps", "200"])
    assert stopped.value.code == 2
    assert f"{loss} is not finite at env step 100" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_a_parameter_that_is_not_finite_is_never_saved(finished, capsys):
    agent = sac.Agent(4, 2, sac.Args(hidden_sizes=(16, 16)))
    agent.critic.net.output.bias.data.fill_(torch.nan)
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit):
        sac.save_checkpoint(finished, {"agent": agent}, {"env_steps": 7}, {})
    assert "agent.critic.net.output.bias is not finite at env step 7" in capsys.readouterr().err
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_the_shell_sees_one_line_and_exit_code_2(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "hyper.py"), "--env-id", "Antt-v4"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
    assert "Ant-v" in result.stderr


def test_pointmass_expert_is_an_expert(demos):
    data = np.load(demos)
    assert data["rewards"].sum() / 5 > 35 and data["terminations"].sum() == 0 and pointmass.expert(np.zeros(4)).shape == (2,)
    assert TINY_HYPER and TINY_SAC
