"""What hyper_paper.py has of its own, by hand or by a second method: optimiser, cost, schedules, cadences."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hyper_paper

TINY = hyper_paper.Args(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), cost_hidden_sizes=(8, 8))


def make_batch(n: int, shift: float = 0.0) -> hyper_paper.Batch:
    obs, actions = torch.randn(n, 3) + shift, torch.rand(n, 2) - 0.5 + shift
    return hyper_paper.Batch(obs, actions, torch.randn(n), torch.randn(n, 3), (torch.rand(n) < 0.5).float())


# ------------------------------------------------------------------------------------------- optimistic Adam
def test_optimistic_adam_by_hand():
    """p += s m(t-1) / (sqrt(v(t-1)) + eps), new moments, p -= 2 s m(t) / (sqrt(v(t)) + eps), the same s for both."""
    p = torch.nn.Parameter(torch.ones(1))
    optimizer, seen = hyper_paper.OptimisticAdam([p], 0.1), []
    for g in (0.5, -0.25, 0.1):
        optimizer.step([torch.tensor([g])])
        seen.append(p.item())
    np.testing.assert_allclose(seen, [0.8000001265, 0.8211463840, 0.7809617305], rtol=3e-6)


def test_optimistic_adam_decays_the_weights_that_it_was_given():
    """Against the recursion written out, with weight decay and a change of the learning rate."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6))
    q, m, v = p.detach().double().clone(), torch.zeros(6).double(), torch.zeros(6).double()
    optimizer = hyper_paper.OptimisticAdam([p], 0.01, weight_decay=0.1)
    for t in range(1, 21):
        lr = 0.01 if t < 10 else 0.002
        optimizer.lr.fill_(lr)
        grad = torch.randn(6)
        optimizer.step([grad])
        g, s = grad.double() + 0.1 * q, lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        q += s * m / (v.sqrt() + 1e-8)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        q -= 2 * s * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), q.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rounds,lr,travel", [(100, 8e-4, 0.0099), (150, 8e-4, 0.0105), (749, 8e-4, 0.0131), (100, 8e-3, 0.099)]
)
def test_cost_rounds_follow_the_sign_with_harmonic_size(rounds, lr, travel):
    """Each round a weight moves by 2 lr g / (|g| + 3.16e-7), lr falling as 1, 1, 1/2, 1/3, ...

    Two weights: one with the gradient 1 of mean f(expert) - mean f(learner) all the time, and a bias that has none.
    """
    args = replace(TINY, cost_members=1, cost_hidden_sizes=(), cost_lr=lr, output_clamp=None)
    cost = hyper_paper.CostEnsemble(1, 1, args)
    weight, bias = cost.net.weights[0], cost.net.biases[0]
    weight.data = torch.tensor([[[0.4], [0.0]]])  # |grad f| is 0.4 at first: no penalty
    b, moves = bias.item(), []
    ones, zeros = torch.ones(4, 1), torch.zeros(4, 1)
    far = 1e6  # the moments' difference outweighs the penalty
    expert = hyper_paper.Batch(far * ones, zeros, zeros[:, 0], zeros, zeros[:, 0])
    learner = hyper_paper.Batch(-far * ones, zeros, zeros[:, 0], zeros, zeros[:, 0])
    for k in range(rounds):
        before = weight[0, 0, 0].item()
        hyper_paper.cost_round(cost, expert, learner, torch.rand(4, 1), k, args)
        moves.append(before - weight[0, 0, 0].item())
    np.testing.assert_allclose(moves[:4], [2 * lr, 2 * lr, lr, 2 * lr / 3], rtol=1e-3)
    assert sum(moves) == pytest.approx(2 * lr * (1 + sum(1 / k for k in range(1, rounds))), rel=1e-3)
    assert sum(moves) == pytest.approx(travel, rel=0.01)
    assert bias.item() == b


# ------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("clamp", [None, 0.2])
def test_moment_loss_and_its_gradient_are_those_of_the_loss_written_out(clamp):
    torch.manual_seed(0)
    cost = hyper_paper.CostEnsemble(3, 2, replace(TINY, output_clamp=clamp)).double()
    expert, learner = (hyper_paper.Batch(*(x.double() for x in make_batch(16, shift))) for shift in (0.0, 1.0))
    mix = torch.rand(16, 1).double()

    def f(x):
        members = []
        for member in range(7):
            h = x
            for weight, bias in list(zip(cost.net.weights, cost.net.biases, strict=True))[:-1]:
                h = torch.relu(h @ weight[member] + bias[member])
            members.append(h @ cost.net.weights[-1][member] + cost.net.biases[-1][member])
        members = torch.cat(members, 1)
        return (members if clamp is None else members.clamp(-clamp, clamp)).min(1).values

    e, l = (torch.cat([data.obs, data.actions], 1) for data in (expert, learner))  # noqa: E741
    points = (mix * e + (1 - mix) * l).requires_grad_()
    (slope,) = torch.autograd.grad(f(points).sum(), points, create_graph=True)
    slope = (slope.square().sum(1) + 1e-12).sqrt()  # where the clamp holds, the slope is 0
    total = f(e).mean() - f(l).mean() + 10 * (slope - 0.4).square().mean()
    loss = hyper_paper.moment_loss(cost, expert, learner, mix)
    params = list(cost.parameters())
    assert clamp is None or (f(l).abs() == clamp).any()
    torch.testing.assert_close(loss, total)
    for ours, theirs in zip(torch.autograd.grad(loss, params), torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(cost.reward(expert.obs[None], expert.actions[None]), -f(e)[None])


def test_cost_rounds_raise_the_reward_of_the_expert_above_the_learners():
    torch.manual_seed(0)
    cost = hyper_paper.CostEnsemble(3, 2, TINY)
    expert, learner = make_batch(256, 1.0), make_batch(256, -1.0)

    def gap():
        on_expert, on_learner = (cost.reward(data.obs, data.actions).mean().item() for data in (expert, learner))
        return on_expert - on_learner

    before = gap()
    for k in range(30):
        hyper_paper.cost_round(cost, expert, learner, torch.rand(256, 1), k, replace(TINY, cost_lr=8e-3))
    assert gap() > max(before, 0) + 0.3


# ------------------------------------------------------------------------------------------- SAC
@pytest.mark.parametrize("alpha_lr", [0.0, 1e-3])
def test_sac_update_steps_along_the_gradients_of_the_losses_written_out(alpha_lr):
    """A first step of optimistic Adam is 2 lr g / (|g| + 3.16e-7). The actor has states of its own."""
    torch.manual_seed(0)
    args = replace(TINY, alpha=0.3, alpha_lr=alpha_lr, gamma=0.9, target_entropy=100.0)
    agent = hyper_paper.Agent(3, 2, args)
    twin = copy.deepcopy(agent)
    batch, actor_obs, noise = make_batch(16), torch.randn(16, 3), torch.randn(2, 16, 2)
    metrics = hyper_paper.sac_update(agent, batch, actor_obs, noise, args)

    def check(module, stepped, loss, lr):
        grads = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for p, g in zip(module.parameters(), grads, strict=True):
                p -= 2 * lr * g / (g.abs() + 3.1623e-7)
        torch.testing.assert_close(list(module.parameters()), list(stepped.parameters()), rtol=1e-4, atol=lr / 50)

    next_actions, next_log_prob = twin.actor.sample(batch.next_obs, noise[0])
    q1, q2 = twin.target_critic(batch.next_obs, next_actions)
    y = batch.rewards + 0.9 * (1 - batch.terminations) * (torch.minimum(q1, q2) - 0.3 * next_log_prob)
    critic_loss = (twin.critic(batch.obs, batch.actions) - y.detach()).square().mean(1).sum()
    torch.testing.assert_close(metrics["losses/critic"], critic_loss.detach())
    check(twin.critic, agent.critic, critic_loss, args.critic_lr)
    actions, log_prob = twin.actor.sample(actor_obs, noise[1])
    actor_loss = (0.3 * log_prob - torch.minimum(*twin.critic(actor_obs, actions))).mean()
    torch.testing.assert_close(metrics["losses/actor"], actor_loss.detach(), rtol=1e-4, atol=1e-4)
    check(twin.actor, agent.actor, actor_loss, args.actor_lr)
    if alpha_lr:  # the entropy is below its target
        assert agent.log_alpha > twin.log_alpha
    else:
        assert agent.log_alpha == twin.log_alpha


def test_the_same_graph_follows_changing_learning_rates():
    """As train changes them: sawtooth and restarts of actor and critics, the model's cosine."""
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(0)
    counters = [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    functions = hyper_paper.sac_update, hyper_paper.cosine_dynamics_update
    compiled = [torch.compile(f, backend=c, dynamic=False) for f, c in zip(functions, counters, strict=True)]
    args = replace(TINY, model_members=2, model_elites=1, model_cosine=5, output_clamp=0.5)
    agents = [hyper_paper.Agent(3, 2, args)] * 2
    models = [hyper_paper.ClampedDynamics(3, 2, args)] * 2
    agents[1], models[1] = copy.deepcopy(agents[1]), copy.deepcopy(models[1])
    for k in range(8):
        batch, obs, noise = make_batch(16), torch.randn(16, 3), torch.randn(2, 16, 2)
        inputs, targets = torch.randn(2, 16, 5), torch.randn(2, 16, 3)
        for agent, update in zip(agents, (functions[0], compiled[0]), strict=True):
            agent.actor_optimizer.lr.fill_(3e-4 * (1 - k / 8))
            if k == 5:
                agent.critic_optimizer.restart(1e-3)
            update(agent, batch, obs, noise, args)
        for model, update in zip(models, (functions[1], compiled[1]), strict=True):
            update(model, inputs, targets, args)
    for eager, graph in (agents, models):
        torch.testing.assert_close(list(eager.parameters()), list(graph.parameters()), rtol=1e-4, atol=1e-6)
    assert [c.frame_count for c in counters] == [1, 1]


# ------------------------------------------------------------------------------------------- model
def test_the_models_mean_changes_are_bounded_and_its_learning_rate_follows_a_cosine():
    torch.manual_seed(0)
    args = replace(TINY, output_clamp=0.05, model_cosine=4, model_lr=1e-2)
    model, seen = hyper_paper.ClampedDynamics(3, 2, args), []
    assert model(10 * torch.randn(7, 50, 5))[0].abs().max().item() == pytest.approx(0.05)
    moved = model.sample(torch.zeros(50, 3), 10 * torch.randn(50, 2), noise=False)
    assert 0 < moved.abs().max() <= 0.0501
    for _ in range(9):
        before = [p.clone() for p in model.parameters()]
        hyper_paper.cosine_dynamics_update(model, torch.randn(7, 8, 5), torch.randn(7, 8, 3), args)
        moves = max((p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True))
        seen.append((model.optimizer.lr.item(), moves))
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(9)]
    np.testing.assert_allclose([lr for lr, _ in seen], expected, atol=1e-8)
    assert seen[0][1] == pytest.approx(1e-2, rel=0.01) and seen[4][1] < 1e-7 < seen[8][1]


def test_rollout_lengths_of_the_published_schedules():
    def lengths(robot):
        args = replace(hyper_paper.Args(), **hyper_paper.TUNED[robot])
        return [hyper_paper.rollout_length(epoch, args) for epoch in range(1, 151)]

    hopper, humanoid = lengths("Hopper"), lengths("Humanoid")
    assert [hopper[e - 1] for e in (1, 23, 24, 30, 40, 50, 60, 80, 100, 150)] == [1, 1, 2, 4, 7, 10, 13, 19, 25, 25]
    assert [humanoid[e - 1] for e in (31, 32, 60, 100, 150)] == [1, 2, 4, 7, 12]
    assert round(sum(hopper) * 400e3 / 1e6) == 914 and round(sum(humanoid) * 400e3 / 1e6) == 327


# ------------------------------------------------------------------------------------------- settings
def test_tuned_is_the_published_table():
    robots = "Hopper", "Walker2d", "Ant", "Humanoid"
    table = dict(
        hidden_sizes=[(512, 512), (1024, 1024), (1024, 1024), (1024, 1024)],
        actor_lr=[3e-4, 1e-4, 1e-4, 1e-4],
        critic_lr=[3e-4, 1e-4, 1e-4, 1e-4],
        lr_sawtooth=[0, 10_000, 0, 10_000],
        alpha=[1, 0.2, 0.2, 1],
        alpha_lr=[3e-4, 0, 0, 1e-4],
        target_entropy=[1, None, None, -1.42],
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
    common = dict(num_demos=64, total_timesteps=151_000, learning_starts=1_000, gamma=0.99, tau=0.005, batch_size=256)
    common |= dict(model_members=7, model_elites=5, model_lr=3e-4, model_batch_size=256, model_every=125)
    common |= dict(model_patience=10, rollouts_per_step=400, rollout_length=(1, 25))
    common |= dict(cost_episodes=4, cost_batch_size=4_096, cost_lr=8e-4, cost_members=7, cost_hidden_sizes=(256, 256))
    for column, robot in enumerate(robots):
        args = replace(hyper_paper.Args(), **hyper_paper.TUNED[robot])
        for name, values in table.items():
            assert getattr(args, name) == values[column], (robot, name)
        for name, value in common.items():
            assert getattr(args, name) == value, (robot, name)
    assert hyper_paper.TUNED["HalfCheetah"] == hyper_paper.TUNED["Walker2d"]
    # The authors' -17 is the entropy of actions in [-0.4, 0.4].
    assert hyper_paper.TUNED["Humanoid"]["target_entropy"] == pytest.approx(-17 - 17 * math.log(0.4), abs=0.005)


# ------------------------------------------------------------------------------------------- environment
def test_a_trembling_hand_replaces_the_given_share_of_actions_as_the_seed_says():
    env = hyper_paper.TremblingHand(hyper_paper.make_env("Pendulum-v1"), 0.3)

    def torques(seed):
        env.reset(seed=seed)
        executed = []
        for _ in range(199):
            env.step(np.full(1, 0.5, np.float32))
            executed.append(env.unwrapped.last_u)
        return np.array(executed)

    episodes = [torques(seed) for seed in range(10)]
    trembled = np.concatenate(episodes) != 1
    assert abs(trembled.sum() - 597) < 5 * math.sqrt(1990 * 0.3 * 0.7)
    assert np.concatenate(episodes)[trembled].min() < -1.8 and np.concatenate(episodes)[trembled].max() > 1.8
    assert (torques(0) == episodes[0]).all() and (episodes[0] != episodes[1]).any()


class Ledger(gym.Wrapper):
    """Keeps every observation that a policy acted on, and counts resets."""

    def __init__(self, env):
        super().__init__(env)
        self.acted_on, self.resets = [], 0

    def reset(self, **kwargs):
        self.resets += 1
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action):
        self.acted_on.append(self.obs)
        self.obs, *others = self.env.step(action)
        return self.obs, *others


@pytest.fixture
def watched_run(monkeypatch, tmp_path):
    """60 training steps on the pendulum, 20 of warm-up, and what its parts were called with.

    Expert states begin with numbers above 100, those imagined in fit number k with 1000 + k.
    """
    n = 30
    obs = np.arange(100, 100 + n + 1, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    ends = np.eye(1, n, n - 1)[0]
    np.savez(tmp_path / "demos.npz", observations=obs[:-1], next_observations=obs[1:], actions=np.zeros((n, 1)),
             rewards=np.ones(n), terminations=np.zeros(n), truncations=ends)  # fmt: skip
    seen = dict(envs=[], queues=[], starts=[], updates=[], targets=[], rounds=[], sizes=[], lengths=[])

    def make_env(env_id, make=hyper_paper.make_env):
        seen["envs"].append(Ledger(make(env_id)))
        return seen["envs"][-1]

    def fit_dynamics(dynamics, update, data, weights, max_batches, args):
        assert (weights == weights[0]).all() and max_batches > 10**6
        seen["queues"].append(data.obs[:, 0].clone())
        return 0.0

    def imagine(dynamics, actor, obs, length, terminates, args):
        seen["starts"].append(obs[:, 0].clone())
        seen["lengths"].append(length)
        x = torch.full((4_500, 3), 1_000.0 + len(seen["starts"]))
        return hyper_paper.Batch(x, torch.zeros(4_500, 1), torch.zeros(4_500), x, torch.zeros(4_500))

    def sac_update(agent, batch, actor_obs, noise, args, update=hyper_paper.sac_update):
        lr = agent.actor_optimizer.lr.item(), agent.critic_optimizer.lr.item()
        moments = agent.actor_optimizer.t.item(), agent.critic_optimizer.t.item()
        torch.testing.assert_close(batch.rewards, -seen["cost"](torch.cat([batch.obs, batch.actions], -1)).detach())
        seen["agent"], fits = agent, len(seen["starts"])
        seen["updates"].append(dict(lr=lr, moments=moments, batch=batch, actor_obs=actor_obs, fits=fits))
        return update(agent, batch, actor_obs, noise, args)

    def polyak(target, source, tau):
        seen["targets"].append((len(seen["updates"]), tau))

    def cost_round(cost, expert, learner, mix, previous_rounds, args, play=hyper_paper.cost_round):
        torch.testing.assert_close(learner.actions, seen["agent"].actor(learner.obs)[0].tanh().detach())
        seen["rounds"].append((len(seen["envs"][0].acted_on), previous_rounds, expert.obs, learner.obs))
        return play(cost, expert, learner, mix, previous_rounds, args)

    def CostEnsemble(*settings, make=hyper_paper.CostEnsemble):
        seen["cost"] = make(*settings)
        return seen["cost"]

    def sample(data, *shape, draw=hyper_paper.sample):
        seen["sizes"].append(len(data.obs))
        return draw(data, *shape)

    for function in (make_env, fit_dynamics, imagine, sac_update, polyak, cost_round, CostEnsemble, sample):
        monkeypatch.setattr(hyper_paper, function.__name__, function)
    args = replace(
        TINY, env_id="Pendulum-v1", demos=str(tmp_path / "demos.npz"), num_demos=1, run_dir=str(tmp_path / "run"),
        total_timesteps=60, learning_starts=20, eval_every=1_000, eval_episodes=1, model_every=4, rollouts_per_step=2,
        updates_per_step=3, update_every=2, lr_sawtooth=50, batch_size=32, cost_every=20, cost_batch_size=64,
        cost_episodes=2, rollout_length=(1, 5), rollout_epochs=(0, 2), reset_every=10, checkpoint_every=1_000,
        actor_lr=1e-3, critic_lr=2e-3, p_tremble=0.0,
    )  # fmt: skip
    seen["rows"] = hyper_paper.train(args)
    return seen


def test_cadences_of_a_run(watched_run):
    seen, (train_env, cost_env, _) = watched_run, watched_run["envs"]

    # Every real step counts: 60 of training and two rounds of two whole episodes.
    assert (len(train_env.acted_on), len(cost_env.acted_on)) == (60, 800)
    assert [row["env_steps"] for row in seen["rows"]] == [0, 860]
    assert train_env.resets == 1 + 5  # cut when learning begins and each 10 steps
    assert [(step, previous) for step, previous, *_ in seen["rounds"]] == [(40, 0), (60, 1)]
    for number, (_, _, expert, learner) in enumerate(seen["rounds"]):
        played = torch.tensor(np.array(cost_env.acted_on[400 * number : 400 * (number + 1)]))
        assert expert[:, 0].min() >= 100 and len(expert) == len(learner) == 64
        assert torch.isin(learner[:, 0], played[:, 0]).all()  # this round's episodes alone

    # The queue: all demonstrations, the warm-up, then an expert transition for each of the learner's.
    for number, queue in enumerate(seen["queues"]):
        learned = 4 * number
        assert len(queue) == 30 + 20 + 2 * learned and (queue >= 100).sum() == 30 + learned
        assert (queue[:30] == torch.arange(100.0, 130.0)).all() and (queue[30:50] < 100).all()
        assert ((queue[50:] >= 100) == torch.arange(2 * learned) % 2).all()

    # One coin for all starts of a call.
    from_expert = [(starts >= 100).float().mean().item() for starts in seen["starts"]]
    assert len(from_expert) == 11 and set(from_expert) == {0.0, 1.0}
    assert set(seen["lengths"]) == {3}  # the first of two epochs from 1 to 5

    # SAC: the last 6,000 imagined transitions alone, other ones for the actor; targets each 4 updates; sawtooth.
    assert len(seen["updates"]) == 3 * 21
    assert seen["targets"] == [(k, 0.005) for k in range(4, 64, 4)]
    for update in seen["updates"]:
        newest = 1_000 + update["fits"]
        for drawn in (update["batch"].obs[:, 0], update["actor_obs"][:, 0]):
            assert set(drawn.tolist()) <= {newest, newest - 1}
    assert any(set(u["batch"].obs[:, 0].tolist()) == {1_000 + u["fits"], 999 + u["fits"]} for u in seen["updates"])
    assert {size for size in seen["sizes"] if size > 1_000} == {4_500, 6_000}
    assert any((u["batch"].obs != u["actor_obs"]).any() for u in seen["updates"])
    since = [*range(33), *range(30)]  # updates since the last round
    for update, k in zip(seen["updates"], since, strict=True):
        assert update["lr"] == pytest.approx((1e-3 * (1 - k / 50), 2e-3 * (1 - k / 50)), rel=1e-5)
    assert [u["moments"] for u in seen["updates"]] == [(k, k) for k in since]
