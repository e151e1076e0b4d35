"""Measure, film or record the policy of a run of any script.

python evaluate.py runs/Hopper-v4__hyper__1__1764294000 --episodes 50
python evaluate.py demos/experts/Hopper-v4.pt --video                 # into videos/; of a run, into its folder
python evaluate.py runs/... --record my.npz --episodes 10             # demonstrations, see demos/README.md
"""

import importlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro


@dataclass
class Args:
    policy: Annotated[Path, tyro.conf.Positional]  # folder of a run, or a policy.pt
    episodes: int = 10
    seed: int = 2**31  # of the first episode; training draws its seeds below 2**31
    video: bool = False  # film the episodes
    record: Path | None = None  # write the episodes to this .npz file
    full_length: bool = False  # record only episodes that reach the time limit
    min_return: float = -np.inf  # record only episodes of at least this return
    p_tremble: float = 0.0  # probability that a step takes a random action instead (needs envs/wrappers.py)
    sample: bool = False  # sampled instead of deterministic actions (offline data rather than demonstrations)


def simulator_state(env: gym.Env) -> np.ndarray:
    """MuJoCo's integration state [k], in double precision: it puts the simulator back to the last bit."""
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.unwrapped.model, spec))
    mujoco.mj_getState(env.unwrapped.model, env.unwrapped.data, state, spec)
    return state


def main(args: Args) -> None:
    """Prints the mean and standard deviation of the returns."""
    file = args.policy / "policy.pt" if args.policy.is_dir() else args.policy
    if not file.exists():
        raise SystemExit(f"evaluate.py: there is no {file}")
    policy = torch.load(file, weights_only=True)
    script = importlib.import_module(policy["script"])
    env = script.make_env(policy["env_id"], "rgb_array" if args.video else None)
    if args.p_tremble:
        env = importlib.import_module("envs.wrappers").TremblingHand(env, args.p_tremble)
    if args.video:
        folder = args.policy if args.policy.is_dir() else Path()
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), lambda episode: True)
    if "task" in policy:  # that of a sequence which the policy is for
        env.unwrapped.task = policy["task"]
    actor = script.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    torch.manual_seed(args.seed)
    low, high = env.unwrapped.action_space.low, env.unwrapped.action_space.high
    data = getattr(env.unwrapped, "data", None)
    has_joints, has_state = hasattr(data, "qpos"), type(data).__module__.startswith("mujoco")

    if args.record and args.p_tremble:
        raise SystemExit("evaluate.py: --record would hold the intended actions, not those of the trembling hand")
    columns, states, returns, lengths, successes, episode, kept = {}, [], [], [], [], 0, 0
    while kept < args.episodes:
        if episode == 10 + 10 * args.episodes:
            raise SystemExit(f"evaluate.py: only {kept} of {episode} episodes were good enough to record")
        obs, _ = env.reset(seed=args.seed + episode)
        steps, episode_states, done, success, episode = [], [], False, np.nan, episode + 1
        while not done:
            action = actor.act(obs, deterministic=not args.sample)
            row = dict(observations=obs, actions=(low + high) / 2 + action * (high - low) / 2)
            if has_joints:
                row |= dict(qpos=data.qpos.copy(), qvel=data.qvel.copy())
            if has_state and len(steps) % 4 == 0:
                episode_states.append(simulator_state(env))
            obs, reward, terminated, truncated, info = env.step(action)
            row |= dict(rewards=reward, next_observations=obs, terminations=terminated, truncations=truncated)
            steps.append(row)
            success = np.fmax(success, np.asarray(info.get("success", info.get("is_success")), float).max())
            done = terminated or truncated
        returns.append(float(info["episode"]["r"]))
        lengths.append(len(steps))
        successes.append(success)
        if not args.record or (returns[-1] >= args.min_return and (truncated or not args.full_length)):
            kept += 1
            states += episode_states
            for name in steps[0]:
                columns.setdefault(name, []).extend(row[name] for row in steps)
    env.close()
    report = f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}, length {np.mean(lengths):.0f}"
    if not np.isnan(successes).all():
        report += f", success rate {np.mean(np.nan_to_num(successes)):.2f}"
    print(f"{policy['env_id']}: {report} over {episode} episodes")
    if args.record:
        arrays = {name: np.array(column, np.float32) for name, column in columns.items()}
        if has_state:
            arrays["states"] = np.array(states)
        about = dict(env_id=policy["env_id"], script=policy["script"], episodes=kept, of=episode, returns=report)
        about |= {name: version(name) for name in ("gymnasium", "mujoco")} | dict(seed=args.seed, sample=args.sample)
        np.savez_compressed(args.record, metadata=json.dumps(about), **arrays)
        print(f"{args.record}: {kept} of {episode} episodes")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
