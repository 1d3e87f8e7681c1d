"""Statistics of a results directory, compared with direct computation on synthetic results with known means."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedbn.errors import UserError
from fedbn_simulations.results import inference
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.files import write_comparison, write_run
from fedbn_simulations.results.inference import MIN_USERS, adjust, mean_of_users, user_interval, worst_of_users
from fedbn_simulations.results.matrix import METRICS
from tests.helpers import nonempty

MEANS = {"global": 0.80, "fedbn": 0.85, "groupnorm": 0.82}
OWN = "row == 'own' and column == 'aggregated'"
ROLES = {"body": 4000, "head": 200, "affine": 64, "statistics": 64, "counter": 2}


def write(
    directory,
    strategies=MEANS,
    *,
    seeds=(0, 1, 2),
    users=12,
    unseen=4,
    user_std=0.05,
    noise=0.01,
    domains=1,
    columns=("aggregated", "recalibrated", "online"),
    unfinished=(),
    name=lambda i: f"user {i:02d}",
    **meta,
):
    """Write a comparison in which a user's accuracy is strategy mean + user effect + noise of the seed.

    groupnorm has no statistics (one column). Users differ on the global test for fedbn only.
    """
    rng = np.random.default_rng(7)
    effect = rng.normal(0, user_std, users + unseen)
    labels = list(strategies)
    write_comparison(
        directory,
        {
            "title": "Synthetic comparison",
            "scenario": "synthetic",
            "strategies": labels,
            "seeds": list(seeds),
            "columns": list(columns),
            "settings": {"rounds": 20, "batch_size": 32},
            "versions": {"fedbn": "0.1.0", "torch": "2.9"},
            "sources": {"synthetic": "ab" * 32},
            "command": "fedbn compare synthetic --strategies global,fedbn",
            "skew": "Feature skew between users, natural; little label skew.",
            "created": "2025-11-22T15:00:00+00:00",
            "notices": [],
        }
        | meta,
    )
    names = [name(i) for i in range(users + unseen)]
    for label, mean in strategies.items():
        for seed in seeds:
            # The same noise per user and seed for all strategies: paired, as with common seeds.
            seed_noise = np.random.default_rng(seed).normal(0, noise, (users + unseen, 3))
            own_noise = np.random.default_rng([seed, labels.index(label)]).normal(0, noise, (users + unseen, 3))
            lines = []
            for k, column in enumerate(columns[:1] if label == "groupnorm" else columns):
                for i, user in enumerate(names):
                    for row in ("own", "global") if i < users else ("unseen",):
                        local = label == "fedbn" or row != "global"
                        value = mean + 0.01 * k
                        value += effect[i] + seed_noise[i, k] if local else 0.001 * seed
                        if local and label != labels[0]:
                            value += own_noise[i, k]
                        accuracy = float(np.clip(value, 0, 1))
                        metrics = {"accuracy": accuracy, "macro_f1": accuracy - 0.05, "loss": 1 - accuracy}
                        cell = {"user": user, "domain": f"domain {i % domains}", "row": row, "column": column, "n": 100}
                        lines.append(cell | metrics)
            if (label, seed) in unfinished:
                (directory / "runs" / f"{labels.index(label)}-{seed}").mkdir(parents=True)
                continue
            local = ("affine", "statistics", "counter") if label == "fedbn" else ()
            owners = dict.fromkeys(ROLES, "shared") | dict.fromkeys(local, "local")
            write_run(
                directory,
                f"{labels.index(label)}-{seed}",
                {
                    "strategy": label,
                    "seed": seed,
                    "lr": 0.1,
                    "seconds": 10.0 + seed,
                    "rounds": 20,
                    "notices": [],
                    "ownership": [
                        {"role": role, "owner": owners[role], "entries": 2, "elements": n, "bytes": 4 * n}
                        | dict.fromkeys(("bytes_down", "bytes_up"), 0 if role in local else 4 * n)
                        for role, n in ROLES.items()
                    ],
                    "newcomer": "the mean of the seen users' statistics" if label == "fedbn" else "the shared model",
                    "curve": [
                        {
                            "round": r,
                            "train_loss": 2 * 0.8**r + 0.02 * seed,
                            "own": (mean + 0.005 * seed) * (1 - 0.6**r) if r % 2 == 0 else None,
                            "unseen": (mean - 0.04) * (1 - 0.6**r) if r % 2 == 0 and unseen else None,
                        }
                        for r in range(1, 21)
                    ],
                    "evaluations": lines,
                },
            )
    return directory


def edit_runs(directory, edit, pattern="*"):
    """Replace the results of runs."""
    for path in nonempty((directory / "runs").glob(f"{pattern}/result.json")):
        write_run(directory, path.parent.name, edit(json.loads(path.read_text())))


def keep_evaluations(directory, keep, pattern="*"):
    """Drop all evaluations but those for which ``keep(seed, evaluation)`` holds."""
    edit_runs(directory, lambda r: r | {"evaluations": [e for e in r["evaluations"] if keep(r["seed"], e)]}, pattern)


def single(frame, **where):
    """The only line of a frame with the given values."""
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def comparison(directory):
    return Comparison.load(directory)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("metric", METRICS)
def test_matrix_means_and_seed_intervals(comparison, metric):
    cells = dict(list(comparison.evaluations.groupby(["strategy", "row", "column"])))
    for line in comparison.matrix(metric).dropna(subset="mean").itertuples():
        if line.row != "worst":
            cell = cells[line.strategy, line.row, line.column]
            assert line.mean == pytest.approx(cell[metric].mean(), abs=1e-12)
            assert line.n_users == cell["user"].nunique()
            per_seed = cell.groupby("seed")[metric].mean()
            assert line.seed_sd == pytest.approx(per_seed.std(), abs=1e-12)
            low, high = stats.t.interval(0.95, 2, loc=per_seed.mean(), scale=per_seed.std() / 3**0.5)
            assert (line.seed_low, line.seed_high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("metric", "worst_is_low"), [("accuracy", True), ("loss", False)])
@pytest.mark.parametrize(("users", "tenth"), [(5, 1), (19, 1), (20, 2), (35, 3)])
def test_matrix_worst_tenth(tmp_path, users, tenth, metric, worst_is_low):
    comparison = Comparison.load(write(tmp_path, {"global": 0.8}, users=users, columns=("aggregated",)))
    per_seed = []
    for _, cell in nonempty(comparison.evaluations.query("row == 'own'").groupby("seed")):
        ordered = np.sort(cell[metric].to_numpy())
        per_seed.append((ordered[:tenth] if worst_is_low else ordered[-tenth:]).mean())
    line = single(comparison.matrix(metric), row="worst")
    assert line["mean"] == pytest.approx(np.mean(per_seed))
    assert line["ci_low"] <= line["mean"] <= line["ci_high"]


def test_worst_of_users_with_different_users_per_seed():
    values = np.array([[0.9, np.nan], [0.2, np.nan], [0.4, 0.7]])
    assert worst_of_users(values) == pytest.approx((0.2 + 0.7) / 2)
    assert worst_of_users(values[:, [1]]) == pytest.approx(0.7)
    # In a resample, a seed may lose all its users; the other seeds are used then.
    assert worst_of_users(values[:2]) == pytest.approx(0.2)
    assert mean_of_users(values[:2]) == pytest.approx(0.55)


def test_user_interval_depends_on_users_not_seeds():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 1, (30, 1))
    noise = rng.normal(0, 0.01, (30, 5))
    narrow, wide = (user_interval(mean_of_users, 0.8 + s * effect + noise) for s in (0.01, 0.1))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    # The same users with more seeds are not more users.
    repeated = user_interval(mean_of_users, np.tile(0.8 + 0.1 * effect, (1, 20)))
    assert repeated.high - repeated.low > 0.8 * (wide.high - wide.low)


def test_user_interval_matches_normal_approximation():
    values = np.random.default_rng(3).normal(0.8, 0.1, (400, 1))
    low, high = user_interval(mean_of_users, values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_user_interval_is_deterministic_and_bounds_memory(monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", 500)
    values = np.random.default_rng(1).random((5000, 2))
    sizes = []

    def statistic(resampled):
        sizes.append(resampled.size)
        return mean_of_users(resampled)

    assert user_interval(statistic, values) == user_interval(statistic, values)
    assert max(sizes) <= 4_000_000 < 500 * values.size


def test_paired_is_mean_difference_by_user(comparison):
    line = single(comparison.paired(), strategy="fedbn", row="own", column="aggregated")
    users = comparison.evaluations.query(OWN)
    table = users.pivot_table(index="user", columns="strategy", values="accuracy")
    difference = table["fedbn"] - table["global"]
    assert line["difference"] == pytest.approx(difference.mean())
    assert line["better"] == (difference > 0.01).sum()
    assert line["worse"] == (difference < -0.01).sum()
    assert line["p"] == pytest.approx(stats.wilcoxon(difference).pvalue)
    # Pairing removes variation that strategies have in common: much narrower than the interval of a mean.
    mean = single(comparison.matrix(), strategy="fedbn", row="own", column="aggregated")
    assert line["ci_high"] - line["ci_low"] < 0.5 * (mean["ci_high"] - mean["ci_low"])
    assert line["ci_low"] < 0.05 < line["ci_high"]


def test_identical_strategies_have_zero_difference(directory, tmp_path):
    for source in nonempty((directory / "runs").glob("0-*/result.json")):
        result = json.loads(source.read_text())
        write_run(tmp_path, source.parent.name, result)
        write_run(tmp_path, f"twin-{source.parent.name}", result | {"strategy": "twin"})
    meta = json.loads((directory / "comparison.json").read_text())
    write_comparison(tmp_path, meta | {"strategies": ["global", "twin"]})
    comparison = Comparison.load(tmp_path)
    paired = comparison.paired()
    assert (paired[["difference", "ci_low", "ci_high", "seed_low", "seed_high"]] == 0).all(axis=None)
    per_user = paired[paired["row"] != "worst"]
    assert (per_user[["p", "p_adjusted"]] == 1).all(axis=None)
    assert (per_user[["better", "worse"]] == 0).all(axis=None)
    assert paired[paired["row"] == "worst"]["p"].isna().all()
    assert comparison.clear_best() == set()


def test_paired_shared_models_are_one_observation(comparison):
    line = single(comparison.paired(), strategy="groupnorm", row="global", column="aggregated")
    assert line["difference"] == pytest.approx(0.02)
    assert np.isnan(line[["ci_low", "ci_high", "p"]].astype(float)).all()
    assert line["seed_low"] == pytest.approx(0.02)


def test_adjusted_p_is_monotone_and_never_smaller(comparison):
    tested = comparison.paired().dropna(subset="p").sort_values("p")
    assert (tested["p_adjusted"] >= tested["p"]).all()
    assert (tested["p_adjusted"].diff().dropna() >= -1e-15).all()
    assert tested["p_adjusted"].iloc[-1] == pytest.approx(tested["p"].iloc[-1])
    assert adjust(pd.Series([np.nan, np.nan])).isna().all()


def test_paired_loss_counts_decrease_as_better(comparison):
    accuracy, loss = (
        single(comparison.paired(m), strategy="fedbn", row="own", column="online") for m in ("accuracy", "loss")
    )
    assert loss["difference"] == pytest.approx(-accuracy["difference"])
    assert (loss["better"], loss["worse"]) == (accuracy["better"], accuracy["worse"])


def test_clear_best_requires_every_paired_interval(comparison):
    best = comparison.clear_best()
    assert ("fedbn", "own", "aggregated") in best
    # Without variation over users there is no interval, so no difference is clear.
    assert not any(strategy == "groupnorm" for strategy, _, _ in best)
    assert {b[:2] for b in comparison.clear_best("loss")} >= {("fedbn", "own")}


def test_clear_best_requires_gain_on_users_in_common(tmp_path):
    write(tmp_path, {"global": 0.6, "fedbn": 0.57}, user_std=0.1, noise=0.001)
    # The worse strategy was tested on the easy users only, and has the higher mean.
    keep_evaluations(tmp_path, lambda _, e: e["row"] == "own" and e["accuracy"] > 0.55, "1-*")
    comparison = Comparison.load(tmp_path)
    mean = comparison.matrix().query(OWN).set_index("strategy")["mean"]
    line = single(comparison.paired(), strategy="fedbn", row="own", column="aggregated")
    assert mean["fedbn"] > mean["global"]
    assert line["ci_high"] < 0
    assert not any(row == "own" and column == "aggregated" for _, row, column in comparison.clear_best())


@pytest.mark.parametrize("users", [MIN_USERS - 1, MIN_USERS])
def test_clear_best_requires_enough_users_for_a_test(users, tmp_path):
    write(tmp_path, {"global": 0.6, "fedbn": 0.8}, users=users)
    best = Comparison.load(tmp_path).clear_best()
    assert (("fedbn", "own", "aggregated") in best) is (users >= MIN_USERS)


def test_comparisons_are_compared_by_identity(comparison, directory):
    assert comparison == comparison
    assert comparison != Comparison.load(directory)
    assert len({comparison, Comparison.load(directory)}) == 2


def test_missing_cells_are_nan(comparison):
    line = single(comparison.matrix(), strategy="groupnorm", row="own", column="online")
    assert np.isnan(line["mean"])
    assert (line["n_users"], line["n_seeds"]) == (0, 0)
    line = single(comparison.paired(), strategy="groupnorm", row="unseen", column="recalibrated")
    assert np.isnan(line["difference"])
    assert line["n_users"] == 0
    assert "GroupNorm" not in comparison.wide().loc["adapted online"].index
    assert comparison.differences("groupnorm", "own", "online").empty


def test_wide_without_unseen_users(tmp_path):
    keep_evaluations(write(tmp_path), lambda _, e: e["row"] == "own", "1-*")
    comparison = Comparison.load(tmp_path)
    assert comparison.wide().loc[("as aggregated", "FedBN"), "unseen users"] == "–"
    assert comparison.wide(labels=True).loc[("as aggregated", "fedbn"), "unseen users"] == "–"


@pytest.mark.parametrize(("users", "seeds"), [(1, (0, 1)), (6, (0,)), (1, (0,))])
def test_intervals_with_one_user_or_one_seed(tmp_path, users, seeds):
    comparison = Comparison.load(write(tmp_path, users=users, unseen=0, seeds=seeds))
    line = single(comparison.matrix(), strategy="fedbn", row="own", column="aggregated")
    paired = single(comparison.paired(), strategy="fedbn", row="own", column="aggregated")
    for result in (line, paired):
        assert np.isnan(result["ci_low"]) == (users == 1)
        assert np.isnan(result["seed_low"]) == (len(seeds) == 1)
    assert np.isnan(paired["p"]) == (users == 1)
    assert "unseen" not in set(comparison.matrix()["row"])
    assert comparison.to_markdown()
    assert comparison.to_latex()


def test_unfinished_runs_are_skipped(tmp_path):
    comparison = Comparison.load(write(tmp_path, unfinished=[("global", 1), ("fedbn", 2)]))
    assert comparison.missing == 2
    assert "2 of 9 runs are not finished" in comparison.notices[0]
    assert single(comparison.matrix(), strategy="fedbn", row="own", column="aggregated")["n_seeds"] == 2
    paired = single(comparison.paired(), strategy="fedbn", row="own", column="aggregated")
    assert paired["n_seeds"] == 1
    common = comparison.evaluations.query(f"seed == 0 and {OWN}")
    means = common.groupby("strategy")["accuracy"].mean()
    assert paired["difference"] == pytest.approx(means["fedbn"] - means["global"])


def test_paired_with_unfinished_reference(tmp_path):
    comparison = Comparison.load(write(tmp_path, seeds=(0,), unfinished=[("global", 0)]))
    assert comparison.paired()["difference"].isna().all()


def test_by_domain(tmp_path):
    comparison = Comparison.load(write(tmp_path, domains=3))
    frame = comparison.by_domain()
    assert set(frame["domain"]) == {"domain 0", "domain 1", "domain 2"}
    assert set(frame["row"]) == {"own", "unseen"}
    line = single(frame, strategy="fedbn", row="own", column="aggregated", domain="domain 1")
    cell = comparison.evaluations.query(f"{OWN} and strategy == 'fedbn' and domain == 'domain 1'")
    assert line["mean"] == pytest.approx(cell["accuracy"].mean())
    assert line["n_users"] == 4


@pytest.mark.parametrize("domains", [1, 13])
def test_by_domain_requires_a_few_domains(tmp_path, domains):
    comparison = Comparison.load(write(tmp_path, {"global": 0.8}, users=20, domains=domains, seeds=(0,)))
    assert comparison.by_domain().empty


def test_traffic_and_seconds(comparison):
    traffic = comparison.traffic().set_index(["strategy", "role"])
    assert traffic.loc[("fedbn", "statistics"), "owner"] == "local"
    assert traffic.loc[("fedbn", "statistics"), "bytes_up"] == 0
    assert traffic.loc[("global", "statistics"), "bytes_up"] == 4 * ROLES["statistics"]
    seconds = comparison.seconds().set_index("strategy").loc["fedbn"]
    assert (seconds["mean"], seconds["sd"], seconds["lr"]) == (11.0, 1.0, "0.1")
    assert seconds["per_round"] == pytest.approx(11 / 20)


def test_to_csv_equals_matrix(comparison, tmp_path):
    comparison.to_csv(tmp_path / "matrix.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "matrix.csv"), comparison.matrix(), check_exact=False)


def test_markdown_and_latex_escape_labels(tmp_path):
    comparison = Comparison.load(write(tmp_path, {"a|b": 0.8, "50%_x": 0.7}))
    assert "| a\\|b |" in comparison.to_markdown()
    assert comparison.to_markdown().count("\n") == 2 + 2 * 3
    assert "50\\%\\_x" in comparison.to_latex()
    assert "worst 10 \\%" in comparison.to_latex()


def test_matrix_returns_copies(comparison):
    changed = comparison.matrix()
    changed["mean"] = 0.0
    assert comparison.matrix()["mean"].max() > 0


def test_nonfinite_values_are_stored_as_null(tmp_path):
    path = write(tmp_path, {"global": 0.8}, seeds=(0,)) / "runs" / "0-0" / "result.json"
    result = json.loads(path.read_text())
    result["evaluations"][0]["loss"] = float("nan")
    result["curve"][0]["train_loss"] = float("inf")
    write_run(tmp_path, "0-0", result)
    assert "NaN" not in path.read_text()
    comparison = Comparison.load(tmp_path)
    assert comparison.curves["train_loss"].isna().sum() == 1
    assert single(comparison.matrix("loss"), row="own", column="aggregated")["n_users"] == 11
    assert single(comparison.matrix(), row="own", column="aggregated")["n_users"] == 12


def test_load_rejects_bad_input(tmp_path, directory):
    with pytest.raises(UserError, match="is not a comparison"):
        Comparison.load(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        Comparison.load(write(tmp_path / "empty", {"global": 0.8}, seeds=(0,), unfinished=[("global", 0)]))
    with pytest.raises(UserError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'"):
        Comparison.load(directory).matrix("acuracy")
    damaged = write(tmp_path / "damaged", {"global": 0.8})
    for content in ('{"strategy": "gl', "[]"):
        (damaged / "runs" / "0-1" / "result.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            Comparison.load(damaged)
    twice = write(tmp_path / "twice", {"global": 0.8})
    write_run(twice, "copy", json.loads((twice / "runs" / "0-1" / "result.json").read_text()))
    with pytest.raises(UserError, match="two results of strategy 'global' with seed 1"):
        Comparison.load(twice)


def test_load_skips_runs_of_other_comparison(tmp_path):
    meta = json.loads((write(tmp_path) / "comparison.json").read_text())
    write_comparison(tmp_path, meta | {"strategies": ["global", "fedbn"]})
    comparison = Comparison.load(tmp_path)
    assert comparison.missing == 0
    assert "2-0, 2-1, 2-2" in comparison.notices[0]
    assert set(comparison.runs["strategy"]) == {"global", "fedbn"}


def test_load_skips_run_of_other_seed_or_strategy(tmp_path):
    meta = json.loads((write(tmp_path) / "comparison.json").read_text())
    write_comparison(tmp_path, meta | {"seeds": [0, 2]})
    comparison = Comparison.load(tmp_path)
    assert "0-1, 1-1, 2-1" in comparison.notices[0]
    assert set(comparison.runs["seed"]) == {0, 2}
    assert len(comparison.runs) == 6
    write_comparison(tmp_path, meta | {"seeds": [0, 2], "strategies": ["global", "fedbn"]})
    assert "0-1, 1-1, 2-0, 2-1, 2-2" in Comparison.load(tmp_path).notices[0]


def test_shared_model_is_compared_for_every_user(tmp_path):
    """A run stores the global test of a shared model once, for its first user; users differ between seeds."""
    write(tmp_path)
    keep_evaluations(tmp_path, lambda seed, e: e["user"] != f"user {seed:02d}")
    for i in (0, 2):  # all but fedbn
        keep_evaluations(
            tmp_path, lambda s, e: e["row"] != "global" or e["user"] == f"user {int(s == 0):02d}", f"{i}-*"
        )
    comparison = Comparison.load(tmp_path)
    pooled = {"row": "global", "column": "aggregated"}
    local = single(comparison.paired(), strategy="fedbn", **pooled)
    means = {s: single(comparison.matrix(), strategy=s, **pooled) for s in MEANS}
    assert local["n_users"] == 12
    assert local["difference"] == pytest.approx(means["fedbn"]["mean"] - means["global"]["mean"])
    assert local["ci_low"] < local["difference"] < local["ci_high"]
    assert np.isnan(means["global"]["ci_low"])
    # Users are in different seeds, so their means differ, but there is only one observation per seed.
    shared = single(comparison.paired(), strategy="groupnorm", **pooled)
    assert np.isnan(shared[["ci_low", "ci_high", "p"]].astype(float)).all()
    assert shared["seed_low"] == pytest.approx(0.02)
    assert (shared["better"], shared["worse"]) == (12, 0)
    assert comparison.evaluations.index.tolist() == list(range(len(comparison.evaluations)))


def test_one_unseen_user_per_seed(tmp_path):
    write(tmp_path, unseen=3)
    keep_evaluations(tmp_path, lambda seed, e: e["row"] != "unseen" or e["user"] == f"user {12 + seed:02d}")
    line = single(Comparison.load(tmp_path).matrix(), strategy="fedbn", row="unseen", column="aggregated")
    assert line["n_users"] == 3
    assert line["ci_low"] < line["mean"] < line["ci_high"]


def test_by_domain_with_domain_missing_in_seed(tmp_path):
    write(tmp_path, users=4, unseen=0, domains=4)
    keep_evaluations(tmp_path, lambda seed, e: seed or e["domain"] != "domain 0")
    table = Comparison.load(tmp_path).by_domain()
    assert table["mean"].notna().all()
    assert set(table.domain) == {f"domain {i}" for i in range(4)}
