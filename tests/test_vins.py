"""VINS: its losses by hand, its choice of actions by brute force, its claim on a toy path."""

import copy
import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import vins
from benchmark import vins_toy
from demos import fetch_experts
from tests.conftest import ROOT

TINY = vins.Args(hidden_sizes=(8,), model_hidden_sizes=(8,), num_candidates=7)
LAYOUT = vins.Layout(state=(0, 1, 2), perturbed=((0, 1), (2,)), goal=(3,))
OBS_DIM, ACT_DIM, ROWS = 5, 2, 12
NUMBERS = {"FetchReach-v4": 100, "FetchPush-v4": 200, "FetchPickAndPlace-v4": 200}  # of demonstrations


def batch(seed: int = 0) -> vins.Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, ROWS, OBS_DIM, generator=generator)
    actions = torch.rand(ROWS, ACT_DIM, generator=generator) * 2 - 1
    return vins.Batch(obs, actions, torch.zeros(ROWS), next_obs, torch.arange(ROWS).remainder(4).eq(3).float())


def agent(args: vins.Args = TINY) -> vins.Agent:
    torch.manual_seed(0)
    sizes = OBS_DIM, ACT_DIM, tuple(LAYOUT), args.hidden_sizes, args.model_hidden_sizes, args.num_candidates
    made = vins.Agent(sizes, batch(), args)
    for weight in made.target_value.parameters():  # as if it lagged behind
        weight.mul_(0.9)
    return made


# ------------------------------------------------------------------------------------------------------ losses
def test_temporal_differences_by_hand():
    """At s the target is -1 + V(s'), at s' it is V(s'), between it is between; beyond a goal nothing comes."""
    it, data = agent(), batch()
    value, target = it.actor.value, it.target_value
    for share in (1.0, 0.0, 0.25):
        expected = 0.0
        for row in range(ROWS):
            point = share * data.obs[row] + (1 - share) * data.next_obs[row]
            beyond = 0.0 if data.terminations[row] else target(data.next_obs[row]).item()
            y = -1 + beyond
            expected += (share * y + (1 - share) * (y + 1) - value(point).item()) ** 2 / ROWS
        found = vins.td_loss(value, target, data, torch.full((6, ROWS), share))
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_interpolations_of_a_transition_are_different_points():
    it, data = agent(), batch()
    mix = torch.rand(3, ROWS)
    whole = vins.td_loss(it.actor.value, it.target_value, data, mix)
    parts = [vins.td_loss(it.actor.value, it.target_value, data, row[None]) for row in mix]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_perturbations_have_their_scale_and_columns():
    obs, std = torch.zeros(20_000, OBS_DIM), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    masks = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    noise = torch.randn(2, *obs.shape, generator=torch.Generator().manual_seed(1)) * masks[:, None]
    perturbed, distances = vins.perturb(obs, std, noise, 0.7)
    assert torch.allclose(perturbed.std(1), 0.7 * std * masks, rtol=0.03)
    assert torch.allclose(distances, (perturbed / std).norm(dim=-1), atol=1e-5)


def test_negative_samples_by_hand():
    """Values fall by lambda for each standard deviation of distance, from the target network's value at the state."""
    it, data = agent(), batch()
    value, target, std = it.actor.value, it.target_value, it.actor.clone.normalise.std
    noise = torch.zeros(1, ROWS, OBS_DIM)
    noise[0, :, 0], noise[0, :, 1] = 3.0, -4.0
    args, expected = replace(TINY, negative_scale=0.5, negative_slope=7.0), 0.0
    for row in range(ROWS):
        moved = data.obs[row] + 0.5 * std * noise[0, row]
        expected += (target(data.obs[row]).item() - 7 * 2.5 - value(moved).item()) ** 2 / ROWS
    assert vins.negative_loss(value, target, data.obs, std, noise, args).item() == pytest.approx(expected, rel=1e-4)
    nothing = vins.negative_loss(value, target, data.obs, std, 0 * noise, args)
    assert nothing.item() == pytest.approx((target(data.obs) - value(data.obs)).square().mean().item(), rel=1e-5)


def test_the_model_learns_the_norm_of_standardised_changes():
    it, data = agent(), batch()
    model = it.actor.model
    changes = (data.next_obs - data.obs)[:, :3]
    error = ((model.predict(data.obs, data.actions) - data.next_obs)[:, :3] / changes.std(0, correction=0)).norm(dim=1)
    assert vins.one_step_loss(model, data).item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert torch.equal(model.predict(data.obs, data.actions)[:, 3:], data.obs[:, 3:])  # the goal stays


def test_an_update_moves_value_and_target_and_negative_samples_need_masks():
    masks = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    for chosen in (masks, None):
        it = agent()
        before, target_before = (copy.deepcopy(net) for net in (it.actor.value, it.target_value))
        losses = vins.vins_update(it, batch(), chosen, TINY)
        assert ("losses/negative" in losses) == (chosen is not None)
        nets = before, it.actor.value, target_before, it.target_value
        for old, new, target_old, target_new in zip(*(net.parameters() for net in nets), strict=True):
            assert not torch.equal(old, new)
            assert torch.allclose(target_new, target_old + TINY.tau * (new - target_old), atol=1e-7)


def test_the_value_of_a_chain_is_minus_the_steps_to_go():
    """Ten states in a row; negative samples have nothing to say on the path."""
    points = torch.linspace(0, 1, 11)[:, None].expand(-1, OBS_DIM)
    data = vins.Batch(points[:-1], torch.zeros(10, ACT_DIM), torch.zeros(10), points[1:], torch.eye(10)[9])
    args = replace(TINY, hidden_sizes=(32,), value_lr=3e-3, tau=0.05)
    torch.manual_seed(0)
    it = vins.Agent((OBS_DIM, ACT_DIM, tuple(LAYOUT), (32,), (8,), 1), data, args)
    for _ in range(800):
        vins.vins_update(it, data, None, args)
    assert torch.allclose(it.actor.value(data.obs), -torch.arange(10, 0, -1.0), atol=0.7)


# -------------------------------------------------------------------------------------------- induced policy
@pytest.mark.parametrize("algo,radius", [("vins", 0.1), ("vins-no-bc", 1.0), ("bc", 0.0)])
def test_the_policy_is_the_best_candidate(algo, radius):
    it, obs = agent(replace(TINY, algo=algo)), batch().obs
    actor, chosen = it.actor, it.actor(batch().obs)
    for row in range(ROWS):
        cloned = actor.clone(obs[row : row + 1])[0]
        base = torch.zeros(ACT_DIM) if algo == "vins-no-bc" else cloned
        outcomes = []
        for noise in actor.noise:
            action = (base + radius * noise).clamp(-1, 1)
            outcomes.append((actor.value(actor.model.predict(obs[row : row + 1], action[None])).item(), action))
        best = max(outcomes, key=lambda pair: pair[0])[1]
        assert torch.allclose(chosen[row], best, atol=1e-6)
        assert np.allclose(actor.act(obs[row].numpy()), best.detach(), atol=1e-6)
        assert (chosen[row] - base).abs().max() <= radius + 1e-6


def test_other_candidates_are_drawn_only_where_asked():
    actor, obs = agent().actor, batch().obs
    torch.manual_seed(3)
    assert torch.equal(actor(obs), actor(obs)) and torch.rand(1) == torch.rand(1, generator=torch.manual_seed(3))
    assert not torch.equal(actor(obs, deterministic=False), actor(obs, deterministic=False))


def test_the_oracle_is_the_simulator_and_leaves_it_as_it_was():
    env, twin = (vins.make_env("FetchPickAndPlace-v4") for _ in range(2))
    actions = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for one in (env, twin):
        one.reset(seed=5)
    for action in actions[:8].numpy():
        outcomes = vins.simulate(env, actions[8:])
        obs, twin_obs = env.step(action)[0], twin.step(action)[0]
        assert np.array_equal(obs, twin_obs)
    outcomes, last = vins.simulate(env, actions[8:]), env.step(actions[8].numpy())[0]
    assert torch.equal(outcomes[0], torch.as_tensor(last)) and not torch.equal(outcomes[0], outcomes[1])


# --------------------------------------------------------------------------------- demonstrations and episodes
@pytest.mark.parametrize("env_id,number", NUMBERS.items())
def test_demonstrations_are_whole_episodes_that_succeed_at_their_end(env_id, number):
    env = vins.make_env(env_id)
    data, (_, ends, _) = np.load(path := ROOT / "demos" / f"{env_id}.npz"), vins.load_demos(path, env, 0, 1, "cpu")
    assert len(ends) == number and ends[-1] == len(data["rewards"]) and data["truncations"].sum() == 0
    distances = np.linalg.norm(data["next_observations"][:, :3] - data["next_observations"][:, 3:6], axis=1)
    assert np.array_equal(np.flatnonzero(distances < 0.05) + 1, ends)
    assert np.array_equal(data["rewards"], -1 + data["terminations"])


def test_the_recorder_writes_what_is_bundled_and_noise_moves_the_actions(tmp_path):
    for noise in (0.0, 0.5):
        args = fetch_experts.Args("FetchReach-v4", episodes=3, demo_noise=noise, out=tmp_path / f"{noise}.npz")
        fetch_experts.main(args)
    bundled, same, noisy = (
        np.load(path) for path in (ROOT / "demos/FetchReach-v4.npz", tmp_path / "0.0.npz", tmp_path / "0.5.npz")
    )
    rows = len(same["actions"])
    assert np.allclose(bundled["observations"][:rows], same["observations"], atol=1e-5)
    assert same["terminations"].sum() == 3 and json.loads(str(noisy["metadata"]))["demo_noise"] == 0.5
    assert not np.allclose(noisy["actions"][:2, :3], same["actions"][:2, :3], atol=0.05)


def test_episodes_end_at_their_first_success():
    shape = (4, 3)
    successes = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 1]], np.float32)
    where = np.arange(12, dtype=np.float32).reshape(shape)
    episodes = vins.Episodes(where[..., None], where[..., None], where, where[..., None], successes)
    found = vins.until_success(episodes, "cpu")
    assert found.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert found.obs[found.terminations > 0].tolist() == [[2], [4]]


def test_side_by_side_is_one_after_the_other():
    """Five environments give the episodes that each would give alone, and successes are counted as they happen."""
    env_id = "FetchReach-v4"
    expert, *_ = vins.load_demos(str(ROOT / f"demos/{env_id}.npz"), vins.make_env(env_id), 10, 1, "cpu")
    torch.manual_seed(0)
    sizes = (len(expert.obs[0]), 4, tuple(vins.LAYOUTS["FetchReach"]), (32,), (8,), 4)
    it = vins.Agent(sizes, expert, replace(TINY, algo="bc", actor_lr=3e-3))
    for _ in range(60):
        vins.adam_step(it.clone_optimizer, vins.clone_loss(it.actor.clone, expert))
    envs = [vins.make_env(env_id) for _ in range(3)]
    found = vins.evaluate_side_by_side(it.actor, envs, 5, 100, False)
    one = [vins.evaluate_side_by_side(it.actor, envs[:1], 1, 100 + episode, False) for episode in range(5)]
    for name in ("eval_return_mean", "eval_success_rate", "eval_success_at_end"):
        assert found[name] == pytest.approx(np.mean([each[name] for each in one]))
    assert found["eval_success_rate"] > 0.5


# -------------------------------------------------------------------------------------------------- the claim
def test_only_with_negative_samples_values_fall_off_the_path():
    conservative, false = (vins_toy.learn(negatives, 1_500) for negatives in (True, False))
    assert vins_toy.too_high(conservative) < 0.3 and vins_toy.too_high(false) > 0.4


def test_worlds_without_a_layout_are_refused():
    gym.register("VinsOther-v0", lambda: None, max_episode_steps=5)
    with pytest.raises(SystemExit, match=r"^vins\.py: what are state and goal of VinsOther-v0"):
        vins.train(vins.Args("VinsOther-v0"))
