"""maml.py: the step on each task, the first-order update of the shared weights, and the ledger of real steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import maml
from tests.conftest import rows
from tests.test_slbo_multitask import Counted

ARGS = maml.Args(env_id="Goals-v0", hidden_sizes=(5,), batch_tasks=3, task_steps=50, held_out_tasks=2, eval_episodes=2)


def parts(tasks=3, n=40):
    """An actor with a normaliser that was used, policies of several tasks, steps [n, tasks, ...] with ends in them."""
    torch.manual_seed(0)
    actor = maml.Actor(4, 2, (5,))
    actor.normalise.update(torch.randn(100, 4) * 3 + 1)
    for param in actor.net.parameters():
        param.data += 0.3 * torch.randn_like(param)
    ends = torch.rand(2, n, tasks) < 0.1
    ends[1, -1] = True
    obs, next_obs = torch.randn(2, n, tasks, 4)
    steps = maml.Steps(obs, torch.randn(n, tasks, 2), torch.randn(n, tasks), next_obs, *ends.float())
    return actor, maml.Adapted(actor, tasks), steps


def test_each_task_gets_the_gradient_of_its_own_steps():
    """Against a policy and an autograd of its own for each task."""
    actor, policies, steps = parts()
    for repeat in range(2):  # the second step begins where the first one ended
        alone = [policies.of_task(i) for i in range(3)]
        advantages = maml.linear_advantages(actor, steps, ARGS)
        maml.inner_step(policies, steps, 0.1, ARGS)
        for i, policy in enumerate(alone):
            mean, log_std = policy(steps.obs[:, i])
            log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(steps.actions[:, i]).sum(-1)
            gradients = torch.autograd.grad((log_prob * advantages[:, i]).mean(), list(policy.net.parameters()))
            moved = policies.of_task(i).net.parameters()
            for old, gradient, new in zip(policy.net.parameters(), gradients, moved, strict=True):
                torch.testing.assert_close(new, old + 0.1 * gradient)
        assert repeat or not torch.equal(policies.shifts[0][0], policies.shifts[0][1])


def test_policies_of_a_batch_are_those_of_its_tasks():
    _, policies, steps = parts()
    maml.inner_step(policies, steps, 0.1, ARGS)
    means, _ = policies(maml.task_by_task(steps.obs))
    for i, mean in enumerate(means.view(3, 40, 2)):
        torch.testing.assert_close(mean, policies.of_task(i)(steps.obs[:, i])[0])


def test_the_outer_gradient_is_the_mean_of_those_at_the_adapted_weights():
    """First order: the step on a task is a constant."""
    actor, policies, steps = parts()
    maml.inner_step(policies, steps, 0.1, ARGS)
    obs, actions = maml.task_by_task(steps.obs), maml.task_by_task(steps.actions)
    advantages = torch.randn(120)
    old = maml.log_prob(actions, *policies(obs)).detach()
    shared = torch.autograd.grad(
        maml.gain(policies, obs, actions, advantages, old, 0.005, ARGS), list(actor.net.parameters())
    )
    own = []
    for i in range(3):
        policy, rows_of = policies.of_task(i), slice(40 * i, 40 * i + 40)
        columns = obs[rows_of], actions[rows_of], advantages[rows_of], old[rows_of]
        gain = maml.gain(policy, *columns, 0.005, ARGS)
        own.append(torch.autograd.grad(gain, list(policy.net.parameters())))
    for gradient, each in zip(shared, zip(*own, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack(each).mean(0))


def test_the_outer_step_raises_the_gain_within_the_divergence():
    actor, policies, steps = parts(n=200)
    maml.inner_step(policies, steps, 0.1, ARGS)
    before, shifts = [param.clone() for param in actor.parameters()], [shift.clone() for shift in policies.shifts]
    metrics = maml.outer_step(policies, steps, ARGS)
    assert metrics["losses/gain"] > 0 and 0.002 < metrics["losses/kl"] <= 0.015
    assert not any(map(torch.equal, before, actor.parameters())) and all(map(torch.equal, shifts, policies.shifts))


def test_advantages_by_loops():
    """Fitted values and lambda-returns of each task, in numpy, backwards through ends and time limits."""
    actor, _, steps = parts()
    found = maml.linear_advantages(actor, steps, ARGS)
    for task in range(3):
        obs, next_obs = (actor.normalise(x[:, task]).clamp(-10, 10).double().numpy() for x in steps[::3][:2])
        features, next_features = (np.concatenate([x, x**2, np.ones((40, 1))], 1) for x in (obs, next_obs))
        rewards, ended, cut = (x[:, task].double().numpy() for x in (steps.rewards, *steps[4:]))
        weights = np.zeros(9)
        for _ in range(21):
            returns = np.zeros(41)
            for t in reversed(range(40)):
                ahead = 0 if ended[t] else next_features[t] @ weights
                trace = 0 if ended[t] or cut[t] else 0.95 * (returns[t + 1] - features[t + 1] @ weights)
                returns[t] = rewards[t] + 0.99 * (ahead + trace)
            advantages = returns[:40] - features @ weights
            gram = features.T @ features + 1e-3 * 40 * np.eye(9)
            weights = np.linalg.solve(gram, features.T @ returns[:40])
        expected = (advantages - advantages.mean()) / advantages.std()
        np.testing.assert_allclose(found[:, task].numpy(), expected, rtol=2e-3, atol=2e-3)


def test_curvature_is_the_divergences_of_all_tasks_policies():
    """F v is what differentiating mean_kl twice gives."""
    actor, policies, steps = parts(n=5)
    maml.inner_step(policies, steps, 0.1, ARGS)
    obs = maml.task_by_task(steps.obs)
    params, old = list(actor.parameters()), [x.detach() for x in policies(obs)]
    vector = torch.randn(sum(param.numel() for param in params))
    slopes = torch.autograd.grad(maml.mean_kl(old, policies(obs)), params, create_graph=True)
    expected = maml.flat(torch.autograd.grad(maml.flat(slopes) @ vector, params))
    names = [name for name, _ in policies.named_parameters()]
    assert [name.removeprefix("actor.") for name in names] == [name for name, _ in actor.named_parameters()]
    found = maml.fisher_product(policies, obs, vector, replace(ARGS, damping=0.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_real_steps_follow_each_other_to_the_end_of_an_episode():
    env = maml.make_env("Goals-v0")
    steps = maml.rollout(maml.Actor(4, 2, (5,)), env, 70, 3, "cpu")
    assert steps.truncations.nonzero().flatten().tolist() == [49, 69] and not steps.terminations.any()
    torch.testing.assert_close(steps.obs[1:50], steps.next_obs[:49])
    torch.testing.assert_close(steps.obs[51:], steps.next_obs[50:69])
    assert not steps.obs[50].equal(steps.next_obs[49]) and not steps.obs[50, 2:].any()  # a start stands still


def test_an_update_collects_before_and_after_the_tasks_steps(tmp_path, monkeypatch):
    """With the shared weights, then with each task's own; the outer step sees the second half; then the normaliser."""
    seen = []
    for name in ("collect", "inner_step", "outer_step"):
        original = getattr(maml, name)

        def noted(policies, *inputs, name=name, original=original):
            result = original(policies, *inputs)
            count, shifted = int(policies.actor.normalise.count), bool(policies.shifts[0].any())
            seen.append((name, count, shifted, inputs[0] if name == "outer_step" else result))
            return result

        monkeypatch.setattr(maml, name, noted)
    args = replace(ARGS, total_timesteps=600, eval_every=300, test_stages=0, run_dir=str(tmp_path))
    maml.train(args)
    order = [("collect", False), ("inner_step", True), ("collect", True), ("outer_step", True)]
    assert [(name, shifted) for name, _, shifted, _ in seen] == 2 * order
    assert [count for _, count, *_ in seen] == 4 * [0] + 4 * [300]
    assert seen[3][3] is seen[2][3] and seen[7][3] is seen[6][3]


def test_real_steps_are_counted_and_a_longer_run_forgets_held_out_tasks(tmp_path, monkeypatch):
    made, make_env = [], maml.make_env
    monkeypatch.setattr(maml, "make_env", lambda *args: made.append(Counted(make_env(*args))) or made[-1])
    args = replace(ARGS, total_timesteps=900, eval_every=300, stage_steps=60, checkpoint_every=300)
    final = maml.train(replace(args, run_dir=str(tmp_path / "a")))[-1]
    taken = made[0].taken
    assert len(taken) == final["env_steps"] == 900 + 2 * 2 * 60
    assert (final["train_steps"], final["test_steps"], final["train_tasks"]) == (900, 240, 9)
    assert [taken.count(maml.draw_task(made[0], 1, False, i)) for i in range(9)] == 9 * [100]
    assert [taken.count(maml.draw_task(made[0], 1, True, i)) for i in range(2)] == 2 * [120]
    args = replace(args, total_timesteps=1200)
    for folder in ("a", "b"):
        maml.train(replace(args, run_dir=str(tmp_path / folder)))
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 5


@pytest.mark.parametrize("name", ["total_timesteps", "eval_every"])
def test_half_an_update_is_refused(name):
    with pytest.raises(SystemExit, match="takes 300 steps"):
        maml.train(replace(ARGS, **(dict(total_timesteps=900, eval_every=300) | {name: 450})))


def test_it_learns(tmp_path):
    """To be near goals that differ: better than at first, before any step on a task, and better still after one."""
    args = replace(ARGS, hidden_sizes=(16,), batch_tasks=10, total_timesteps=10_000, eval_every=10_000, max_kl=0.1)
    args = replace(args, task_steps=50, stage_steps=500, held_out_tasks=5, gamma=0.9)
    table = maml.train(replace(args, run_dir=str(tmp_path)))
    assert table[-1]["test/after_0"] > table[0]["eval_return_mean"] + 5
    assert table[-1]["test/after_500"] > table[-1]["test/after_0"]
