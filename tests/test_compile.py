"""--compile and a GPU change the speed, not the result."""

import contextlib
import copy
import importlib
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyper
import sac
from tests.conftest import ROOT, rows
from tests.test_scripts import COMMANDS

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILED = [script for script in COMMANDS if hasattr(importlib.import_module(script), "compiled")]
ARGS = hyper.Args(
    device="cpu", compile="on", hidden_sizes=(16,), model_hidden_sizes=(16,), cost_hidden_sizes=(16,), bc_coef=10.0
)


def batch_of(*shape: int) -> hyper.Batch:
    ends = (torch.rand(shape) < 0.3).float()
    return hyper.Batch(torch.randn(*shape, 3), torch.rand(*shape, 2) - 0.5, ends, torch.randn(*shape, 3), ends)


def draw(name: str) -> tuple:
    """Random inputs of an update of hyper.py, without its networks and settings."""
    if name == "sac_update":
        return batch_of(32), batch_of(8), torch.randn(2, 32, 2)
    if name == "dynamics_update":
        return torch.randn(7, 32, 5), torch.randn(7, 32, 3)
    return batch_of(32), batch_of(32), torch.rand(32, 1)


NETWORKS = dict(sac_update=hyper.Agent, dynamics_update=hyper.EnsembleDynamics, cost_update=hyper.Cost)


def assert_twenty_updates_agree(name: str, args: hyper.Args) -> None:
    torch.manual_seed(0)
    eager = NETWORKS[name](3, 2, args)
    before, other, update = copy.deepcopy(eager), copy.deepcopy(eager), getattr(hyper, name)
    compiled = hyper.compiled(update, args)
    for _ in range(20):
        inputs = [batch_to(x, args.device) for x in draw(name)]
        results = update(eager, *inputs, args), compiled(other, *inputs, args)
    if results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    ours, theirs, old = (dict(module.named_parameters()) for module in (eager, other, before))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(ours[name], old[name]) for name in ours if ours[name].requires_grad)


def batch_to(x, device: str):
    return x.to(device) if torch.is_tensor(x) else hyper.Batch(*(field.to(device) for field in x))


@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_compiled_updates_agree_with_eager_ones(name):
    assert_twenty_updates_agree(name, ARGS)


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_updates_in_cuda_graphs_agree_with_eager_ones(name, bf16):
    assert_twenty_updates_agree(name, replace(ARGS, device="cuda", bf16=bf16))


@needs_compiler
def test_what_was_compiled_for_a_copy_serves_the_original():
    """So that nothing is compiled while a CUDA graph is recorded."""
    agent, update = hyper.Agent(3, 2, ARGS), hyper.compiled(hyper.sac_update, ARGS)
    update(copy.deepcopy(agent), *draw("sac_update"), copy.deepcopy(ARGS))
    with torch.compiler.set_stance("fail_on_recompile"):
        update(agent, *draw("sac_update"), ARGS)


# ------------------------------------------------------------------------------ CUDA graphs, without a GPU
class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes each operation on tensors, undoes what they changed, and repeats them."""

    def __enter__(self):
        self.operations, self.before = [], {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits for the GPU"
        assert torch.Tag.nondeterministic_seeded not in function.tags, "draws random numbers"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            for x in tree_leaves(value) if argument.alias_info and argument.alias_info.is_write else ():
                self.before.setdefault(id(x), (x, x.clone()))
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in reversed(self.before.values()):
            x.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if not torch.is_tensor(old) or old._is_zerotensor():
                    continue
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_graph_takes_new_inputs_and_changes_nothing_while_it_is_recorded(no_gpu_needed):
    torch.manual_seed(0)
    eager = sac.Agent(3, 2, sac.Args(device="cpu", hidden_sizes=(8,)))
    other, args = copy.deepcopy(eager), sac.Args(device="cpu", hidden_sizes=(8,))
    loop = partial(sac.sac_updates, sac.sac_update)
    graph = sac.CudaGraph(loop)
    for n in (2, 2, 3, 2):  # a new number of updates is a new recording
        batches, noise, state = batch_of(n, 16), torch.randn(n, 2, 16, 2), torch.get_rng_state()
        kept = copy.deepcopy(batches)
        torch.testing.assert_close(graph(other, batches, noise, args), loop(eager, batches, noise, args))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(batches, kept)
    assert len(graph.recorded) == 2
    for ours, theirs in zip(eager.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        ours, theirs = getattr(eager, name), getattr(other, name)
        assert ours.t == theirs.t == 9
        torch.testing.assert_close([*ours.mean, *ours.square], [*theirs.mean, *theirs.square])


def test_a_graph_is_of_the_networks_it_was_recorded_with(no_gpu_needed):
    args = sac.Args(device="cpu", hidden_sizes=(8,))
    agents, graph = [sac.Agent(3, 2, args) for _ in range(2)], sac.CudaGraph(sac.sac_update)
    before = copy.deepcopy(agents)
    for agent in agents[:1] * 2:
        graph(agent, batch_of(16), torch.randn(2, 16, 2), args)
    changed = [
        not torch.equal(agent.actor.net.weights[0], old.actor.net.weights[0])
        for agent, old in zip(agents, before, strict=True)
    ]
    assert changed == [True, False]
    graph(agents[1], batch_of(16), torch.randn(2, 16, 2), args)
    assert not torch.equal(agents[1].actor.net.weights[0], before[1].actor.net.weights[0])


@pytest.mark.parametrize("kind", ["graphs", "whole"])
@pytest.mark.parametrize("script", COMPILED)
def test_updates_wait_for_nothing_and_draw_nothing(script, kind, no_gpu_needed, tmp_path, monkeypatch):
    """A run with recorded updates has the eager run's rows; and each update is traced as a whole."""

    def compiled(module, function, args, loop=None):
        if kind == "whole":
            torch._dynamo.config.trace_autograd_ops = True
            function = torch.compile(function, fullgraph=True, backend="eager", dynamic=False)
        function = partial(loop, function) if loop else function
        return module.CudaGraph(function) if kind == "graphs" else function

    module = importlib.import_module(script)
    monkeypatch.chdir(ROOT)
    words = [*COMMANDS[script].replace("--total-timesteps 300", "--total-timesteps 120").split(), "--device", "cpu"]
    module.train(tyro.cli(module.Args, args=[*words, "--run-dir", str(tmp_path / "eager")]))
    monkeypatch.setattr(module, "compiled", partial(compiled, module))
    module.train(tyro.cli(module.Args, args=[*words, "--run-dir", str(tmp_path / kind)]))
    assert rows(tmp_path / kind) == rows(tmp_path / "eager")


# ------------------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("length,choice", [(9_999, "off"), (10_000, "on")])
def test_long_runs_are_compiled(length, choice, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert sac.pick_device(sac.Args(device="cpu", total_timesteps=length)).compile == choice
    assert capsys.readouterr().out == f"sac.py: --device cpu --compile {choice}\n"


def test_without_a_compiler_runs_are_eager_and_say_so(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    args = sac.pick_device(sac.Args(device="cpu"))
    assert args.compile == "off" and sac.compiled(sac.sac_update, args) is sac.sac_update
    assert "--compile off, because torch.compile fails: RuntimeError('no g++')" in capsys.readouterr().out


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = sac.pick_device(sac.Args(compile="off"))
    assert args.device == "cuda" and sac.pick_device(sac.Args(compile="off", device="cpu")).device == "cpu"
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert isinstance(sac.compiled(sac.sac_update, replace(args, compile="on")), sac.CudaGraph)
