"""LoRA-RITE: the same steps for every factoring of the product, by the definition."""

import io
from types import SimpleNamespace

import peft
import pytest
import torch

from tlora.adapter.chain import make_chain
from tlora.adapter.freeze import freeze_a
from tlora.adapter.rite import LoraRite, make_rite
from tlora.errors import ConfigError

M, D, R, STEPS = 7, 5, 3, 6
BETAS, RATE, EPS = (0.9, 0.99), 0.05, 1e-6


@pytest.fixture(autouse=True)
def random_state():
    torch.manual_seed(3)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def products(a, b, make, loss, frozen=False):
    """Return B A before and after each step of an optimizer on copies of a and b."""
    a, b = (each.clone().requires_grad_() for each in (a, b))
    a.requires_grad_(not frozen)
    optimizer = make(a, b)
    found = [(b @ a).detach()]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(b @ a, step).backward()
        optimizer.step()
        found.append((b @ a).detach())
    return found


def rite(a, b, **fields):
    group = {"params": [a, b], "pairs": True}
    return LoraRite([group], lr=RATE, betas=BETAS, **({"weight_decay": 0.0} | fields))


@pytest.fixture
def loss():
    """A loss of the product that no step leaves at rest, with another target at each step."""
    left, target = randn(M, M), randn(STEPS, M, D)
    return lambda product, step: (torch.tanh(left @ product) - target[step]).square().sum()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_product_moves_alike_however_it_is_factored(loss, frozen, decay):
    a, b, turn = randn(R, D), randn(M, R), randn(R, R)
    other = (turn @ a, b @ torch.linalg.inv(turn))

    def make(a, b):
        return rite(a, b, weight_decay=decay)

    first = products(a, b, make, loss, frozen)
    for one, two in zip(first, products(*other, make, loss, frozen), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)
    assert (first[-1] - first[0]).norm() > 0.1

    def adamw(a, b):
        return torch.optim.AdamW([p for p in (a, b) if p.requires_grad], lr=RATE)

    plain = products(a, b, adamw, loss, frozen)
    assert not torch.allclose(plain[1], products(*other, adamw, loss, frozen)[1], rtol=1e-2)


class Dense:
    """One factor's half of the definition with no basis: all of r columns as projected n x m."""

    def __init__(self, rows, width):
        self.first, self.second = randn(rows, width) * 0, randn(width, width) * 0
        self.escaped, self.count = 0.0, 0

    def step(self, gradient, other):
        """Return the step of X (n x r) from dL/dZ as n x width, and Y (width x r)."""
        self.count += 1
        d1, d2 = (b * (1 - b ** (self.count - 1)) / (1 - b**self.count) for b in BETAS)
        projector = other @ torch.linalg.pinv(other)
        seen = gradient @ projector
        moved = projector @ self.second @ projector
        top = [torch.linalg.svdvals(each)[:R] for each in (self.second, moved)]
        self.escaped = d2 * (self.escaped + float((top[0] - top[1]).max().clamp_min(0)))
        self.second = d2 * moved + (1 - d2) * seen.T @ seen / len(seen)
        # (V + rho P)^(1/2) + eps P, whose pseudoinverse is the inverse within the range of P.
        u, s, vh = torch.linalg.svd(self.second + self.escaped * projector)
        root = (u * s.clamp_min(0).sqrt()) @ vh + EPS * projector
        scaled = seen @ torch.linalg.pinv(root, rtol=1e-9)
        self.first = d1 * self.first @ projector + (1 - d1) * scaled
        return self.first @ torch.linalg.pinv(other).T


def test_it_is_the_definition_computed_without_a_basis(loss):
    # B starts at zero, as LoRA's does.
    a, b = randn(R, D), randn(M, R) * 0
    found = products(a, b, rite, loss)
    halves = Dense(D, M), Dense(M, D)
    for step, product in enumerate(found[1:]):
        z = (b @ a).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, step), z)
        moves = halves[0].step(gradient.T, b), halves[1].step(gradient, a.T)
        a, b = a - RATE * moves[0].T, b - RATE * moves[1]
        torch.testing.assert_close(product, b @ a, rtol=1e-6, atol=1e-7)
    assert halves[0].escaped > 0


def test_pairs_of_one_size_do_not_see_each_other(loss):
    starts = [(randn(R, D), randn(M, R)) for _ in range(3)]
    alone = [products(a, b, rite, loss)[-1] for a, b in starts]
    factors = [each.clone().requires_grad_() for pair in starts for each in pair]
    optimizer = LoraRite(
        [{"params": factors, "pairs": True}], lr=RATE, betas=BETAS, weight_decay=0.0
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss(b @ a, step) for a, b in zip(factors[::2], factors[1::2], strict=True)).backward()
        optimizer.step()
    for a, b, expected in zip(factors[::2], factors[1::2], alone, strict=True):
        torch.testing.assert_close((b @ a).detach(), expected, rtol=1e-9, atol=1e-10)


def test_a_loaded_state_goes_on_as_if_nothing_had_been(loss):
    a, b = randn(R, D), randn(M, R)
    whole = products(a, b, rite, loss)

    def stopped(a, b):
        optimizer, inner = rite(a, b), rite(a, b)

        class Reloading:
            zero_grad = optimizer.zero_grad

            def step(self):
                inner.step()
                buffer = io.BytesIO()
                torch.save(inner.state_dict(), buffer)
                buffer.seek(0)
                inner.load_state_dict(torch.load(buffer, weights_only=True))

        return Reloading()

    for one, two in zip(whole, products(a, b, stopped, loss), strict=True):
        assert torch.equal(one, two)


ARGUMENTS = SimpleNamespace(
    learning_rate=1e-2, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, weight_decay=0.0
)


def adapted(model, **fields):
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], **fields)
    return peft.get_peft_model(model, config)


def test_what_is_no_factor_moves_as_under_adamw(tiny_llama):
    found = []
    ids = torch.arange(3, 9).reshape(1, -1)
    for make in (lambda m: make_rite(m, ARGUMENTS), adamw):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), modules_to_save=["lm_head"])
        optimizer = make(model)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        found.append(dict(model.named_parameters()))
    for name, value in found[0].items():
        same = torch.equal(value, found[1][name])
        assert same == ("lora_B" not in name), name


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)


def test_a_frozen_a_stays_and_b_steps(tiny_llama):
    model = adapted(tiny_llama())
    freeze_a(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    ids = torch.arange(3, 9).reshape(1, -1)
    optimizer = make_rite(model, ARGUMENTS)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == ("lora_B" not in name), name


def test_a_model_without_factors_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="this method trains none; choose another optimizer"):
        make_rite(tiny_llama(), ARGUMENTS)
    with pytest.raises(ConfigError, match="launch the run with DDP"):
        make_rite(adapted(tiny_llama()), SimpleNamespace(deepspeed="zero2.json"))


def test_a_loaded_state_of_16_bit_factors_stays_in_float32():
    ends = []
    for reload in (False, True):
        torch.manual_seed(4)
        a, b = (torch.nn.Parameter(torch.randn(*size).bfloat16()) for size in ((R, D), (M, R)))
        optimizer = rite(a, b)
        for step in range(3):
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            optimizer.step()
            if reload and step == 1:
                state = optimizer.state_dict()
                optimizer = rite(a, b)
                optimizer.load_state_dict(state)
        assert optimizer.state[a]["second"].dtype == torch.float32
        ends.append((a.detach(), b.detach()))
    assert all(map(torch.equal, *ends))


def test_of_a_chain_the_newest_link_steps_as_alone(tiny_llama):
    ids = torch.arange(3, 9).reshape(1, -1)
    found = []
    for length in (1, 3):
        torch.manual_seed(0)
        model = adapted(tiny_llama())
        if length > 1:
            make_chain(model, length, "lora")
        optimizer = make_rite(model, ARGUMENTS)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        found.append([p for p in model.parameters() if p.requires_grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
