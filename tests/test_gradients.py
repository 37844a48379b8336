"""The streamed backward pass against ordinary autograd through the whole model, and the two-sided closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from calibration.ends import embedding_loss, head_divergence, head_moment
from calibration.labels import NO_LABEL, next_tokens, sample, uniforms
from calibration.moments import Moments, module_weight
from calibration.replay import opened
from calibration.structure import discover
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint.errors import UserError
from checkpoint.source import Source
from compress.methods.two_sided import correction, kronecker, two_sided
from compress.parts import Factors

LENGTH, WINDOWS, BATCH, SEED = 24, 6, 4, 7
NEEDS = frozenset({"second", "gradient", "samples", "weighted", "input", "output_gradient"})


def forwarded(directory, hidden, windows: int = WINDOWS, dtype: torch.dtype = torch.float32):
    """A model, its structure, the ids, and a sweep that has gone forward; ``windows`` are to go backward."""
    source = Source(directory, dtype, separate_experts=True)
    structure = discover(source)
    ids = torch.randint(3, zoo.VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    sweep = Sweep(source, structure, Windows(ids, {}), hidden, BATCH, windows)
    sweep.embed()
    for layer in structure.layers:
        with opened(source, layer) as open_layer:
            sweep.advance_and_sum(open_layer, [layer.linears[:3], layer.linears[3:]], NEEDS)
    return source, structure, ids, sweep


def streamed(directory, tmp_path, fisher: str, gradient_windows: int = WINDOWS, dtype: torch.dtype = torch.float32):
    """Moments of every linear by the streamed sweeps, and the ids."""
    hidden = tmp_path / f"hidden-{fisher}-{dtype}"
    source, structure, ids, sweep = forwarded(directory, hidden, gradient_windows, dtype)
    sweep.start_backward(fisher, SEED)
    moments: dict[str, Moments] = {}
    for layer in reversed(structure.layers):
        with opened(source, layer) as open_layer:
            found = sweep.collect_backward(open_layer, layer.linears, NEEDS)
            moments |= {linear.name: found[linear.local] for linear in layer.linears}
    return structure, moments, ids


def autograd(directory, structure, ids: torch.Tensor, fisher: str):
    """Inputs ``(tokens, d_in)`` and output gradients ``(tokens, d_out)`` of every linear by one pass through the whole model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        y.retain_grad()
        outputs[name] = y
        inputs[name] = x.detach().reshape(-1, x.shape[-1])

    for linear in structure.linears:
        model.get_submodule(linear.name).register_forward_hook(lambda _, x, y, name=linear.name: keep(name, x[0], y))
    logits = model(ids, use_cache=False).logits
    if fisher == "sampled":
        labels = torch.stack(
            [sample(logits[i].detach().softmax(-1), uniforms(SEED, i, LENGTH)) for i in range(len(ids))]
        )
    else:
        labels = torch.stack([next_tokens(row) for row in ids])
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_LABEL
    ).backward()
    return inputs, {name: y.grad.reshape(-1, y.shape[-1]) for name, y in outputs.items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("name", zoo.CONTRACT)
def test_streamed_gradient_moments_are_those_of_the_whole_model(models, tmp_path, name, fisher):
    structure, moments, ids = streamed(models(name), tmp_path, fisher)
    inputs, gradients = autograd(models(name), structure, ids, fisher)
    whole = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    for linear in structure.linears:
        got, g = moments[linear.name], gradients[linear.name]
        assert got.gradient_tokens == ids.numel() == got.tokens
        assert got.gradient_power == pytest.approx(float((g**2).mean()), rel=1e-4)
        assert difference(got.gradient, g.T @ g / len(g)) < 1e-5, linear.name
        if linear.d_out > linear.d_in:
            pulled = g @ module_weight(whole.get_submodule(linear.name)).detach()
            assert difference(got.pulled, pulled.T @ pulled / len(pulled)) < 1e-5, linear.name
        x = inputs[linear.name]
        assert difference(got.input, x.T @ x / len(x)) < 1e-5, linear.name
        layer = structure.layers[linear.layer]
        (group,) = (group for group in layer.groups if linear in group.linears)
        weights = sum(gradients[item.name].square().sum(1, keepdim=True) for item in group.linears)
        assert difference(got.weighted, (weights * x).T @ x / weights.sum()) < 1e-5, linear.name


@pytest.mark.parametrize("windows", [1, 4, 5])  # of micro-batches of four
def test_gradients_may_use_fewer_windows_than_activations(models, tmp_path, windows):
    structure, moments, ids = streamed(models("llama"), tmp_path, "sampled", gradient_windows=windows)
    stored = [path for path in (tmp_path / "hidden-sampled-torch.float32").iterdir() if path.name[0] in "0t"]
    sizes = {path.stat().st_size // LENGTH // torch.float32.itemsize for path in stored}
    assert len(stored) == len(structure.layers) + 1, "what does not go backward is not kept"
    assert sizes == {windows * structure.linears[0].d_in}
    inputs, _ = autograd(models("llama"), structure, ids, "sampled")
    _, gradients = autograd(models("llama"), structure, ids[:windows], "sampled")
    for linear in structure.linears:
        got, x, g = moments[linear.name], inputs[linear.name], gradients[linear.name]
        assert got.tokens == ids.numel() and got.gradient_tokens == windows * LENGTH
        assert difference(got.gradient, g.T @ g / len(g)) < 1e-5
        assert difference(got.input, x.T @ x / len(x)) < 1e-5, "of all windows"
        assert got.input_power == pytest.approx(float(x.square().mean()), rel=1e-5)


def test_sums_of_a_killed_run_are_passed_over_and_damaged_ones_told(models, tmp_path):
    source, structure, ids, sweep = forwarded(models("llama"), tmp_path / "hidden", 2)
    sweep.start_backward("sampled", SEED)
    last = structure.layers[-1]
    kept = tmp_path / "hidden" / f"sums-{last.index:04d}-1.safetensors"
    kept.with_name(f"sums-{last.index:04d}-7.tmp").write_bytes(b"half of")  # of a run in more rounds
    with opened(source, last) as open_layer:
        found = sweep.collect_backward(open_layer, last.linears, NEEDS)
        assert all(item.tokens == ids.numel() for item in found.values())
        kept.write_bytes(kept.read_bytes()[:100])
        with pytest.raises(UserError, match="is damaged.*--fresh"):
            sweep.collect_backward(open_layer, last.linears, NEEDS)
    sweep.forget(last.index + 1)
    assert not list((tmp_path / "hidden").glob(f"sums-{last.index:04d}-*"))


def test_bfloat16_statistics_are_near_those_of_float32(models, tmp_path):
    """Within 10 % in the moments of gradients, 3 % in those of activations (few tokens, large weights)."""
    _, exact, _ = streamed(models("llama"), tmp_path, "empirical")
    _, rough, _ = streamed(models("llama"), tmp_path, "empirical", dtype=torch.bfloat16)
    for name, moments in exact.items():
        kind = "gradient" if moments.gradient is not None else "pulled"
        assert difference(getattr(rough[name], kind), getattr(moments, kind)) < 0.1, name
        if moments.input is not None:
            assert difference(rough[name].input, moments.input) < 0.03, name
            assert float(torch.linalg.eigvalsh(rough[name].input.double()).min()) > -1e-6 * float(moments.input.trace())


def test_labels_are_drawn_from_the_model_and_repeat():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, -5.0]]).repeat(20000, 1)
    drawn = sample(
        logits.softmax(-1), torch.rand(40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    frequencies = torch.stack([torch.bincount(drawn[i::2], minlength=3) / 20000 for i in range(2)])
    assert torch.allclose(frequencies, torch.softmax(logits[:2], -1), atol=0.01)
    assert torch.equal(uniforms(1, 2, 9), uniforms(1, 2, 9)) and not torch.equal(uniforms(1, 2, 9), uniforms(1, 3, 9))
    assert next_tokens(torch.tensor([4, 5, 6])).tolist() == [5, 6, NO_LABEL]


@pytest.mark.parametrize("vocabulary", [5, 256, 700, 1024])
def test_labels_are_those_of_the_running_sums_over_the_whole_vocabulary(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = (3 * torch.randn(2000, vocabulary, generator=generator)).softmax(-1)
    uniform = torch.rand(2000, generator=generator, dtype=torch.float64)
    sums = probabilities.double().cumsum(-1)
    threshold = uniform[:, None] * sums[:, -1:]
    expected = torch.searchsorted(sums, threshold).squeeze(1)
    drawn = sample(probabilities, uniform)
    near = (sums - threshold).abs().min(dim=1).values < 1e-6  # where float32 sums may fall on the other side
    assert torch.equal(drawn[~near], expected[~near]) and int(near.sum()) < 20


def two_sided_problem(
    d_out: int, d_in: int, tokens: int = 300
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(d_out)
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=generator)
    mixes = [
        torch.randn(d, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -1.5, d) for d in (d_in, d_out)
    ]
    x, g = (torch.randn(tokens, len(mix), dtype=torch.float64, generator=generator) @ mix.T for mix in mixes)
    second, fisher = x.T @ x / tokens, g.T @ g / tokens
    wide = d_out <= d_in
    moments = Moments(
        tokens,
        float(second.diagonal().mean()),
        input=None if wide else second,
        output=weight @ second @ weight.T if wide else None,
        gradient_tokens=tokens,
        gradient_power=float(fisher.diagonal().mean()),
        gradient=fisher if wide else None,
        pulled=None if wide else weight.T @ fisher @ weight,
    )
    return weight, second, fisher, moments


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_two_sided_is_the_truncated_svd_between_the_roots(shape):
    weight, second, fisher, moments = two_sided_problem(*shape)
    rank = 8
    left, right = torch.linalg.cholesky(fisher).T, torch.linalg.cholesky(second)
    u, s, v = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    expected = torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(right)
    factors = kronecker(weight, moments, rank, 1e-13)
    assert torch.allclose(factors.a @ factors.b, expected, atol=1e-6)
    assert float(factors.loss[rank]) == pytest.approx(float((s[rank:] ** 2).sum()) / 2, rel=1e-6)
    assert float(factors.loss[0]) == pytest.approx(float((s**2).sum()) / 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(160, 240), (240, 160)])
def test_a_few_directions_of_an_error_are_those_of_all_of_it(shape):
    """Found by products with vectors: nearly the least that so many directions can leave, between the roots."""
    error, second, fisher, moments = two_sided_problem(*shape)
    moments = replace(moments, input=second.float(), gradient=fisher.float(), pulled=None, output=None)
    rank = 6

    def left(factors: Factors) -> float:
        rest = error - factors.a @ factors.b
        return float(((fisher @ rest @ second) * rest).sum())

    few, exact = correction(error, moments, rank, 1e-9), kronecker(error, moments, rank, 1e-9)
    assert few.a.shape == (shape[0], rank) and not few.loss.numel()
    assert left(exact) * 0.9999 <= left(few) <= left(exact) * 1.002
    every = correction(error, moments, min(shape), 1e-9)
    assert torch.allclose(every.a @ every.b, error, atol=1e-5), "all directions: as they always were"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_two_sided_is_not_beaten_by_descent(shape):
    weight, second, fisher, moments = two_sided_problem(*shape)
    rank = 3

    def objective(approximation: torch.Tensor) -> torch.Tensor:
        error = weight - approximation
        return ((fisher @ error @ second) * error).sum() / 2

    factors = kronecker(weight, moments, rank, 1e-13)
    best = float(objective(factors.a @ factors.b))
    a = torch.randn(shape[0], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(
        True
    )
    b = torch.randn(rank, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(
        True
    )
    optimiser = torch.optim.LBFGS([a, b], max_iter=800, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = objective(a @ b)
        value.backward()
        return value

    optimiser.step(closure)
    found = float(objective(a @ b).detach())
    assert best <= found * (1 + 1e-9) and found < best * 1.5
    assert best == pytest.approx(float(factors.loss[rank]), rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_two_sided_at_full_rank_gives_the_weight_back_from_few_tokens(shape, tokens):
    weight, _, _, moments = two_sided_problem(*shape, tokens=tokens)
    full = min(shape)
    factors = kronecker(weight, moments, full, 1e-3)
    assert torch.allclose(factors.a @ factors.b, weight, atol=1e-8)
    assert bool((factors.loss.diff() <= 1e-12).all())


def test_samples_are_the_same_tokens_of_input_and_gradient(models, tmp_path):
    """Each output is the weight times the sampled input, and each gradient is that token's own."""
    structure, moments, ids = streamed(models("llama"), tmp_path, "sampled")
    _, gradients = autograd(models("llama"), structure, ids, "sampled")
    for linear in structure.linears:
        got = moments[linear.name]
        assert got.input_samples.shape == (ids.numel(), linear.d_in), "fewer tokens than samples: all are kept"
        assert torch.allclose(
            got.gradient_samples, gradients[linear.name], atol=1e-6 * float(gradients[linear.name].abs().max()) + 1e-7
        )
        if got.input is not None:
            assert difference(got.input_samples.T @ got.input_samples / ids.numel(), got.input) < 1e-5


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_corrected_loss_is_the_fisher_of_each_direction(shape):
    """On all tokens: dropping one direction costs half its squared product with the gradient, not the Kronecker estimate."""
    weight, _, _, moments = two_sided_problem(*shape)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, shape[1], dtype=torch.float64, generator=generator)
    g = torch.randn(400, shape[0], dtype=torch.float64, generator=generator) * x[:, :1]  # they depend on each other
    factors = two_sided(weight, replace(moments, input_samples=x, gradient_samples=g), 6, 1e-3)
    plain = kronecker(weight, moments, 6, 1e-3)
    assert torch.allclose(factors.a, plain.a) and torch.allclose(factors.b, plain.b)
    for i in range(6):
        change = x @ (factors.a[:, i : i + 1] @ factors.b[i : i + 1]).T
        cost = float(((g * change).sum(1) ** 2).mean()) / 2
        assert float(factors.loss[i] - factors.loss[i + 1]) == pytest.approx(cost, rel=1e-3)
    with pytest.raises(ValueError, match="samples"):
        two_sided(weight, moments, 6, 1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])  # tied; with a head of its own; a scaled embedding
def test_losses_of_changed_ends_are_those_of_the_whole_model(models, tmp_path, name):
    source, structure, ids, sweep = forwarded(models(name), tmp_path / "hidden")
    sweep.start_backward("empirical", SEED)
    for layer in reversed(structure.layers):
        with opened(source, layer) as open_layer:
            sweep.collect_backward(open_layer, layer.linears, NEEDS)
    dense = AutoModelForCausalLM.from_pretrained(models(name)).eval()
    embedding, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    changes = torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(4)) * 0.02
    outputs = []
    embedding.register_forward_hook(lambda _, x, y: (y.requires_grad_(True), y.retain_grad(), outputs.append(y))[0])
    logits = dense.requires_grad_(False)(ids, use_cache=False).logits
    labels = torch.stack([next_tokens(row) for row in ids])
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_LABEL
    ).backward()
    scale = getattr(embedding, "embed_scale", 1.0)
    expected = (outputs[0].grad * changes[ids] * scale).sum(-1).square().mean() / 2
    names = {end.role: f"{end.name}.weight" for end in structure.ends}
    assert set(names) == ({"embedding", "head"} if name == "qwen2" else {"embedding"})
    with torch.no_grad():
        new = embedding.weight + changes
        assert embedding_loss(sweep, {names["embedding"]: new}) == pytest.approx(float(expected), rel=1e-3)
        before = head.weight.clone()
        head.weight = torch.nn.Parameter(before + changes)  # of its own from here on, where it was tied
        changed = dense(ids, use_cache=False).logits.log_softmax(-1)
    first = logits.detach().log_softmax(-1)
    expected = (first.exp() * (first - changed)).sum(-1).mean()
    weights = {names.get("head", names["embedding"]): before + changes}
    assert head_divergence(sweep, weights) == pytest.approx(float(expected), rel=1e-3)
    moment, doubt = head_moment(sweep)
    assert doubt == pytest.approx(float((1 - first.exp().square().sum(-1)).mean()), rel=1e-4)
    assert moment.shape == (before.shape[1], before.shape[1])
    assert all(parameter.is_meta for parameter in source.model.parameters()), "everything was evicted"
