"""SAC's blocks against hand calculation or a second method."""

import copy
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sac


def agent_and_batch(batch: int = 6, **settings):
    torch.manual_seed(0)
    args = sac.Args(hidden_sizes=(8, 8), **settings)
    agent = sac.Agent(3, 2, args)
    fields = sac.Batch(torch.randn(batch, 3), torch.rand(batch, 2) * 2 - 1, torch.randn(batch), torch.randn(batch, 3), torch.zeros(batch))
    return agent, fields, torch.randn(2, batch, 2), args


def test_log_prob_is_the_density_of_the_squashed_gaussian():
    agent, batch, noise, _ = agent_and_batch()
    action, log_prob = agent.actor(batch.obs, noise[0])
    mean, log_std = agent.actor.net(batch.obs[None])[0].chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.transforms.TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(agent.actor.act(batch.obs[0].numpy())), mean[0].tanh())


def test_the_density_integrates_to_one_and_is_finite_at_the_edge():
    """One action dimension, from mean 0.4 and standard deviation 0.9 before the tanh; then |u| = 20, where tanh rounds to 1."""
    actor = sac.Actor(3, 1, (8,))
    with torch.no_grad():
        actor.net.output.weight.zero_()
        actor.net.output.bias.copy_(torch.tensor([0.4, math.log(0.9)]).view_as(actor.net.output.bias))
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None].float()
    action, log_prob = actor(torch.zeros(20_001, 3), noise)
    assert torch.trapezoid(log_prob.double().exp(), action[:, 0].double()).item() == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        actor.net.output.bias.copy_(torch.tensor([20.0, -20.0]).view_as(actor.net.output.bias))
    action, log_prob = actor(torch.zeros(5, 3), torch.randn(5, 1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), actor.net.output.bias)
    assert (action == 1).all() and torch.isfinite(log_prob).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("fan_out", [1, 3, 20])
@pytest.mark.parametrize("bf16", [False, True])
def test_stacked_linear_is_a_linear_layer_a_member(fan_out, bf16):
    """Values and gradients, in each of the forms that StackedLinear chooses from."""
    torch.manual_seed(0)
    layer, x = sac.StackedLinear(2, 5, fan_out), torch.randn(2, 7, 5, requires_grad=True)
    torch.nn.init.normal_(layer.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = layer(x).float()
    theirs = torch.stack([F.linear(x[i], layer.weight[i].T, layer.bias[i, 0]) for i in range(2)])
    close = dict(rtol=0.05, atol=0.1) if bf16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, **close)
    pull, wanted = torch.randn_like(ours), (x, layer.weight, layer.bias)
    ours, theirs = (torch.autograd.grad((y * pull).sum(), wanted) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Where glibc gives large pieces back to the system, tensors of the same size again and again need no new pages."""
    code = """
import resource, torch, sac
if {}: sac.keep_freed_memory()
def page_faults():
    for _ in range(100):
        tensors = [torch.ones(300_000) for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-page_faults() + page_faults())
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    env |= dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")  # what glibc starts with and may move away from
    without, kept = (
        int(subprocess.check_output([sys.executable, "-c", code.format(keep)], cwd=Path(sac.__file__).parent, env=env))
        for keep in (False, True)
    )
    assert kept < without / 50


def test_optimistic_adam_by_hand():
    """Values of the reference recursion with lr 0.1; a first step is 2 lr g / (|g| + 3.1623e-7)."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = sac.Adam([p], 0.1, optimistic=True).double()
    seen = []
    for g in (0.5, -0.25, 0.1):
        optimizer.step([torch.tensor([g], dtype=torch.float64)])
        seen.append(p.item())
    np.testing.assert_allclose(seen, [0.8000001265, 0.8211463840, 0.7809617305], atol=1e-8)
    for k, g in enumerate((0.3, -1e-6, 2e-7)):
        before = p.item()
        optimizer.restart()
        optimizer.lr.fill_(0.01 / max(1, k))
        optimizer.step([torch.tensor([g], dtype=torch.float64)])
        assert p.item() - before == pytest.approx(-2 * 0.01 / max(1, k) * g / (abs(g) + 3.1623e-7), rel=1e-3)


def test_adam_is_torchs_adam_with_weight_decay():
    torch.manual_seed(0)
    ours, theirs = [[torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)] for _ in range(2)]
    a, b = sac.Adam(ours, 0.01, weight_decay=0.1), torch.optim.Adam(theirs, 0.01, weight_decay=0.1)
    for _ in range(20):
        grads = [torch.randn_like(p) for p in ours]
        a.step(grads)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_stacked_mlp_is_n_separate_networks():
    torch.manual_seed(0)
    net, x = sac.StackedMLP(7, [4, 8, 8, 3], F.silu), torch.randn(7, 5, 4)
    for member in range(7):
        h = x[member]
        for layer in net.hidden:
            h = F.silu(h @ layer.weight[member] + layer.bias[member])
        torch.testing.assert_close(net(x)[member], h @ net.output.weight[member] + net.output.bias[member])


def test_critic_gradient_step_against_autograd_on_the_written_out_loss():
    agent, batch, noise, args = agent_and_batch(gamma=0.9, alpha=0.3)
    batch = batch._replace(terminated=torch.tensor([0.0, 1, 0, 1, 0, 0]))
    twin = copy.deepcopy(agent)
    actor_obs = torch.randn(6, 3)
    sac.sac_update(agent, batch, actor_obs, noise, args)

    next_action, next_log_prob = twin.actor(batch.next_obs, noise[0])
    q1, q2 = twin.target_critic(batch.next_obs, next_action)
    y = [r.item() + (0.0 if d else 0.9 * (min(a, b).item() - 0.3 * lp.item()))
         for r, d, a, b, lp in zip(batch.reward, batch.terminated, q1, q2, next_log_prob, strict=True)]  # fmt: skip
    optimizer = torch.optim.Adam(twin.critic.parameters(), args.critic_lr)
    q = twin.critic(batch.obs, batch.action)
    (F.mse_loss(q[0], torch.tensor(y)) + F.mse_loss(q[1], torch.tensor(y))).backward()
    optimizer.step()
    torch.testing.assert_close(list(agent.critic.parameters()), list(twin.critic.parameters()), rtol=1e-4, atol=1e-6)

    optimizer = torch.optim.Adam(twin.actor.parameters(), args.actor_lr)
    action, log_prob = twin.actor(actor_obs, noise[1])
    (0.3 * log_prob - torch.minimum(*twin.critic(actor_obs, action))).mean().backward()
    optimizer.step()
    # where a gradient is tiny the two Adams' epsilons matter; a wrong sign would move a weight by 6e-4
    torch.testing.assert_close(list(agent.actor.parameters()), list(twin.actor.parameters()), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("target,direction", [(100.0, 1), (-100.0, -1)])
def test_temperature_rises_when_entropy_is_below_its_target(target, direction):
    agent, batch, noise, args = agent_and_batch(target_entropy=target)
    before = agent.log_alpha.item()
    sac.sac_update(agent, batch, batch.obs, noise, args)
    assert (agent.log_alpha.item() - before) * direction > 0


def test_target_update_moves_a_share_tau():
    agent, *_ = agent_and_batch()
    before = [p.clone() for p in agent.target_critic.parameters()]
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.add_(1.0)
    sac.target_update(agent, 0.25)
    torch.testing.assert_close(list(agent.target_critic.parameters()), [p + 0.25 for p in before])


def test_compiled_step_agrees_with_eager():
    torch._dynamo.config.trace_autograd_ops = True
    agent, batch, noise, args = agent_and_batch()
    twin = copy.deepcopy(agent)
    compiled = torch.compile(sac.sac_update)
    for _ in range(20):
        sac.sac_update(agent, batch, batch.obs, noise, args)
        compiled(twin, batch, batch.obs, noise, args)
    torch.testing.assert_close(dict(agent.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)


def test_the_first_compiled_call_says_how_long_it_took(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *inputs: -function(*inputs))
    assert sac.compiled(abs, sac.Args()) is abs
    call = sac.compiled(abs, sac.Args(compile=True))
    assert [call(-3), call(4)] == [-3, -4]
    assert capsys.readouterr().err.count("compiled abs in 0 s") == 1


def test_replay_keeps_the_newest_in_order():
    buffer = sac.ReplayBuffer(5, 2, 1, torch.device("cpu"))
    for i in range(8):
        buffer.add(np.full(2, i), np.full(1, i), float(i), np.full(2, i + 1), i % 2 == 0)
    batch = buffer.split(buffer.newest(3))
    assert batch.reward.tolist() == [5, 6, 7] and batch.terminated.tolist() == [0, 1, 0] and batch.next_obs[:, 0].tolist() == [6, 7, 8]
    drawn = buffer.split(buffer.sample((1000,), torch.Generator().manual_seed(0)))
    assert set(drawn.reward.tolist()) == {3, 4, 5, 6, 7}
    assert set(buffer.split(buffer.sample((500,), torch.Generator(), newest=2)).reward.tolist()) == {6, 7}
    buffer.resize(7)
    buffer.add(np.zeros(2), np.zeros(1), 8.0, np.zeros(2), False)
    assert buffer.split(buffer.newest(9)).reward.tolist() == [3, 4, 5, 6, 7, 8]


def test_every_transition_is_sampled_equally():
    buffer = sac.ReplayBuffer(10, 1, 1, torch.device("cpu"))
    for i in range(13):
        buffer.add(np.zeros(1), np.zeros(1), float(i), np.zeros(1), False)
    counts = torch.bincount(buffer.split(buffer.sample((50_000,), torch.Generator().manual_seed(1))).reward.long(), minlength=13)
    assert counts[:3].sum() == 0 and (counts[3:] - 5000).abs().max() < 5 * math.sqrt(5000)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4", "dm_control/cartpole-swingup-v0"])
def test_an_environment_is_put_back_exactly(env_id):
    env = sac.ResumableEnv(sac.make_env(env_id), [3, 0], p_tremble=0.1)
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, env.action_space.shape).astype(np.float32) for _ in range(60)]
    env.reset()
    env.reset()

    def advance(env, actions):
        seen = []
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            seen.append((obs, reward))
            if terminated or truncated:
                env.reset()
        return seen

    advance(env, actions[:30])
    other = sac.ResumableEnv(sac.make_env(env_id), [99, 0], p_tremble=0.1)
    other.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(env.obs, other.obs)
    for (a, r), (b, q) in zip(advance(env, actions[30:]), advance(other, actions[30:]), strict=True):
        np.testing.assert_array_equal(a, b)
        assert r == q


@pytest.mark.parametrize("env_id,kept", [("Ant-v5", 27), ("Humanoid-v4", 45), ("Humanoid-v5", 45)])
def test_observations_are_the_leading_columns(env_id, kept):
    full, ours = gym.make(env_id), sac.make_env(env_id)
    a, _ = full.reset(seed=1)
    b, _ = ours.reset(seed=1)
    assert len(a) > kept and ours.observation_space.shape == (kept,)
    data = full.unwrapped.data
    np.testing.assert_allclose(b, a[:kept])
    np.testing.assert_allclose(b, np.concatenate([data.qpos[2:], data.qvel]))


def test_actions_are_rescaled_once():
    env = sac.make_env("Humanoid-v4")
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    env.reset(seed=0)
    env.step(np.full(17, 0.5, np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.2, rtol=1e-6)


def test_trembling_hand_replaces_the_given_share_of_actions():
    env = sac.ResumableEnv(sac.make_env("Pendulum-v1"), [0], p_tremble=0.3)
    env.reset()
    trembled = 0
    for _ in range(2000):
        env.step(np.full(1, 0.5, np.float32))
        trembled += env.executed[-1][0] != 0.5
    assert abs(trembled - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)
