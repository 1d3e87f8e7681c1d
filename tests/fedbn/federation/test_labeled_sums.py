"""Labeled sums as messages: engines, protection, validation."""

from dataclasses import replace

import pytest
import torch

from fedbn.config import Plan
from fedbn.errors import UserError
from fedbn.federation.labeled_sums import (
    client_sums,
    parse_sums_method,
    sums_notice,
    sums_of_clients,
    sums_schema,
    total_of,
)
from fedbn.federation.run import Run
from fedbn.federation.setup import build_context
from fedbn.nn.schema import check_names, check_tensors, check_values
from fedbn.online.sums import add_sums

RUN = Run("digits8:users=3:unseen=1", "fedavg", plan=Plan(rounds=1, eval_every=1))
MATCHED = parse_sums_method("matched")


def context(privacy=""):
    return build_context(replace(RUN, privacy=privacy).resolved())


def messages(ctx, method=MATCHED):
    model = ctx.load(ctx.initial)
    return [client_sums(ctx, user, model, method, 0, {}) for user in ctx.population.seen]


def test_secure_total_is_the_sum_of_the_messages():
    plain, secure = context(), context("secure=true")
    found = total_of(secure, MATCHED, messages(secure))
    for name, value in add_sums(messages(plain)).items():
        assert torch.allclose(found[name], value, atol=1e-5)
    with pytest.raises(UserError, match="secure sums need every seen client"):
        total_of(secure, MATCHED, messages(secure)[1:])


def test_masked_message_hides_the_sums():
    first = [messages(context("secure=true"))[0]["masked"] for _ in range(2)]
    assert torch.equal(*first)  # keyed by purpose
    assert first[0].double().abs().median() > 2**55


def test_clipped_sums_have_equal_weight_and_bounded_norm():
    sent = messages(context("clip=0.1"))
    for message in sent:
        norm = torch.cat([v.flatten() for v in message.values()]).norm()
        assert norm == pytest.approx(0.1, abs=1e-6)
    wide = messages(context("clip=1e9"))
    assert all(float(m["n"].sum()) == pytest.approx(1) for m in wide)


def test_noise_is_keyed_by_user_and_reproducible():
    a, b = messages(context("clip=1e9:noise=1e-9")), messages(context("clip=1e9:noise=1e-9"))
    clean = messages(context("clip=1e9"))
    moved = [m["first"] - c["first"] for m, c in zip(a, clean, strict=True)]
    assert torch.equal(a[0]["first"], b[0]["first"])
    assert not torch.allclose(moved[0], moved[1])
    assert moved[0].std() == pytest.approx(1, rel=0.2)


def test_notice_counts_every_release():
    pytest.importorskip("opacus")
    ctx, rotation = context("clip=1:noise=4"), parse_sums_method("rotation")
    one, more = (float(sums_notice(ctx, m).split("epsilon = ")[1].split()[0]) for m in ([MATCHED], [MATCHED, rotation]))
    assert one < more
    assert "7 releases" in sums_notice(ctx, [MATCHED, rotation])
    assert sums_notice(context(), [MATCHED]) == ""


@pytest.mark.parametrize("privacy", ["", "secure=true", "clip=1:noise=1"])
def test_schema_accepts_messages_and_refuses_others(privacy):
    ctx = context(privacy)
    schema, message = sums_schema(ctx, MATCHED), messages(ctx)[0]
    assert not check_names(message, schema)
    assert check_tensors(message, schema) is None
    assert check_values(message, schema) is None
    name = next(iter(message))
    assert check_tensors({name: message[name][:-1]}, schema)
    if not privacy:
        assert check_values({name: -1 - message[name]}, schema)
        assert check_values({name: message[name] * torch.nan}, schema)


def test_sums_of_clients_is_the_result_of_all_rounds():
    ctx = context()
    found = sums_of_clients(ctx, ctx.load(ctx.initial), MATCHED)
    expected = MATCHED.from_sums(add_sums(messages(ctx)))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("privacy", "number", "hint"), [("clip=1:noise=1", 1, True), ("clip=1:noise=1", 0, False), ("", 1, False)]
)
def test_error_names_noise_of_earlier_rounds(monkeypatch, privacy, number, hint):
    def fails(self, model, data, received):
        raise UserError("unusable")

    monkeypatch.setattr(type(MATCHED), "client_sums", fails)
    ctx = context(privacy)
    with pytest.raises(UserError, match="unusable") as caught:
        client_sums(ctx, 0, ctx.load(ctx.initial), MATCHED, number, {})
    assert ("noise" in str(caught.value)) is hint
