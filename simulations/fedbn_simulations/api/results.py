"""Results of the Python API: they display in a notebook, convert to tables, draw plots and return trained models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from fedbn.data.population import Population
from fedbn.errors import UserError, unknown
from fedbn.federation.run import Run
from fedbn.federation.server import Outcome
from fedbn.federation.setup import build_context
from fedbn.federation.trained import trained_model
from fedbn.files import read_json, write_atomically
from fedbn.online import Personalized
from fedbn.online.fallback import FallbackModel
from fedbn.personalization.treatment import treatment, treatment_text
from fedbn_simulations.adaptation.check import Decision
from fedbn_simulations.adaptation.following import CAPACITY, choose_rule, personalize_source, source_of
from fedbn_simulations.experiments.tasks import CHECKPOINT
from fedbn_simulations.results.comparison import Comparison
from fedbn_simulations.results.labels import readable
from fedbn_simulations.storage.checkpoint import load_outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A figure that displays in a notebook and can be saved.

    Attributes:
        figure: figure of Matplotlib, to be changed or extended.
        name: what it shows.
    """

    figure: Figure
    name: str

    def save(self, path: str | Path) -> None:
        """Write a ``.png``, ``.pdf`` or ``.svg`` file.

        Raises:
            UserError: another suffix.
        """
        from fedbn_simulations.report.style import pdf, png, svg

        path = Path(path)
        writers: dict[str, Callable[[], bytes]] = {
            ".png": lambda: png(self.figure),
            ".pdf": lambda: pdf(self.figure),
            ".svg": lambda: svg(self.figure, "plot", self.name).encode(),
        }
        if path.suffix not in writers:
            raise UserError(f"plots are saved as {', '.join(writers)}, not as {path.name!r}")
        write_atomically(path, writers[path.suffix]())

    def _repr_png_(self) -> bytes:
        from fedbn_simulations.report.style import png

        return png(self.figure)


class ComparisonResult(Comparison):
    """Result of `compare`."""

    def plot_matrix(self, metric: str = "") -> Plot:
        """The evaluation matrix: one panel per row, a dot with its 95 % interval over users per cell."""
        from fedbn_simulations.report.plots import matrix_figure

        return Plot(matrix_figure(self, metric), f"matrix of {metric or self.metric}")

    def plot_paired(self, row: str = "own", column: str = "aggregated", metric: str = "") -> Plot:
        """Each user's difference to the reference, one panel per strategy.

        Raises:
            UserError: no strategy can be compared with the reference in this cell.
        """
        from fedbn_simulations.report.plots import paired_figure

        figure = paired_figure(self, row, column, metric)
        if figure is None:
            raise UserError(
                f"no strategy has differences to {self.reference_name} in row {row!r}, column {column!r}: compare at "
                "least two strategies, and choose a cell that both have"
            )
        return Plot(figure, f"differences to {self.reference_name}")

    def plot_convergence(self) -> Plot:
        """The task's main metric and the training loss by round.

        Raises:
            UserError: a single round was evaluated.
        """
        from fedbn_simulations.report.plots import convergence_figure

        figure = convergence_figure(self)
        if figure is None:
            raise UserError("one evaluated round makes no curve: train for more rounds, or set a smaller eval_every")
        return Plot(figure, "convergence")

    def best(self, row: str = "own", column: str = "aggregated", metric: str = "") -> str:
        """The strategy with the best mean over all users and seeds in a cell, after the last round.

        It describes the table: nothing is selected on test data, neither rounds nor seeds nor options.
        Whether the difference to the others is more than chance is answered by `clear_best`. Options such as the
        learning rate are chosen on validation data (``tune={"lr": [0.01, 0.1]}``).

        Raises:
            UserError: an unknown metric, or no strategy has this cell.
        """
        matrix = self.matrix(metric).dropna(subset="mean")
        cell = matrix[(matrix["row"] == row) & (matrix["column"] == column)].set_index("strategy")["mean"]
        if cell.empty:
            raise UserError(f"no strategy has row {row!r}, column {column!r}; cells: {self.cells}")
        return str(cell.idxmax() if self.higher_is_better(metric) else cell.idxmin())

    def model(self, strategy: Any, user: str | None = None, seed: int | None = None) -> nn.Module:
        """Copy of a trained network, in evaluation mode.

        Args:
            strategy: a strategy of the comparison, as text or object.
            user: name of a user, whose own (local) entries are included; None for the model of the server.
            seed: a seed of the comparison; None for the first.

        Raises:
            UserError: an unknown strategy, user or seed, an unfinished run, or a strategy that shares no model.
        """
        run, outcome = self._finished(strategy, seed)
        return trained_model(build_context(run), outcome, user)

    def choose_rule(self, strategy: Any, seed: int | None = None) -> Decision:
        """The online rule that the seen users choose for a trained network, with the reason and all gains.

        Every candidate is checked on their later recordings, which takes minutes; the parts are stored. See
        `fedbn_simulations.adaptation.check`.

        Raises:
            UserError: as `model`, or a network without statistics to follow.
        """
        return choose_rule(source_of(*self._finished(strategy, seed)), self.directory)

    def personalize(
        self, strategy: Any, rule: str = "auto", seed: int | None = None, capacity: int = CAPACITY
    ) -> Personalized | FallbackModel:
        """The trained network with separate states of users that it follows online; see `fedbn.personalize`.

        Args:
            strategy: a strategy of the comparison, as text or object.
            rule: text of the rule, such as ``"rotation+population:diversity=1"``, with the priors that the seen users'
                data determine; ``"auto"`` for that of `choose_rule`.
            seed: a seed of the comparison; None for the first.
            capacity: number of users in memory.

        Raises:
            UserError: as `choose_rule`, or an unknown rule, or one that does not fit the task or the data.
        """
        return personalize_source(source_of(*self._finished(strategy, seed)), rule, self.directory, capacity)

    def _finished(self, strategy: Any, seed: int | None) -> tuple[Run, Outcome]:
        """A run with its outcome."""
        text = str(treatment(treatment_text(strategy)))
        if text not in self.meta["strategies"]:
            raise unknown("strategy of this comparison", text, self.meta["strategies"])
        seed = self.meta["seeds"][0] if seed is None else seed
        if seed not in self.meta["seeds"]:
            raise unknown("seed of this comparison", str(seed), map(str, self.meta["seeds"]))
        found = self.runs[(self.runs["strategy"] == text) & (self.runs["seed"] == seed)]["run"]
        if found.empty:
            raise UserError(f"the run of {text} with seed {seed} is not finished: `fedbn resume {self.directory}`")
        directory = self.directory / "runs" / found.iloc[0]
        run = Run.from_dict(read_json(directory / "result.json")["run"])
        sources = build_context(run).population.sources
        return run, load_outcome(directory / CHECKPOINT, run, sources)


@dataclass(frozen=True, eq=False, repr=False)
class FederationResult:
    """Result of `federate`.

    Attributes:
        run: the run.
        outcome: state of the server, states of the clients, curve and scores.
    """

    run: Run
    outcome: Outcome

    @property
    def population(self) -> Population:
        """Users with their data, partitioned and shifted."""
        return build_context(self.run).population

    def to_pandas(self) -> pd.DataFrame:
        """Scores, one line per user and cell of the evaluation matrix."""
        users = self.population.users
        return pd.DataFrame(
            {"user": users[i].name, "domain": users[i].domain, **score.as_dict()}
            for i, scores in sorted(self.outcome.scores.items())
            for score in scores
        )

    def curve(self) -> pd.DataFrame:
        """Training loss by round, and means of the task's main metric in evaluated rounds."""
        return pd.DataFrame([asdict(point) for point in self.outcome.curve])

    def model(self, user: str | None = None) -> nn.Module:
        """Copy of the trained network, in evaluation mode; see `fedbn.federation.trained.trained_model`."""
        return trained_model(build_context(self.run), self.outcome, user)

    def choose_rule(self) -> Decision:
        """The online rule that the seen users choose; see `ComparisonResult.choose_rule`. Nothing is stored."""
        return choose_rule(source_of(self.run, self.outcome))

    def personalize(self, rule: str = "auto", capacity: int = CAPACITY) -> Personalized | FallbackModel:
        """The trained network with separate states of users; see `ComparisonResult.personalize`."""
        return personalize_source(source_of(self.run, self.outcome), rule, capacity=capacity)

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self._table().to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self._table().to_html()}"

    def _headline(self) -> str:
        run = self.run
        return f"{readable(run.strategy)} on {run.scenario}, seed {run.seed}: {len(self.outcome.curve)} rounds"

    def _table(self) -> pd.DataFrame:
        """Mean of the task's main metric over users: rows and columns of the matrix."""
        metric = build_context(self.run).task.main_metric
        return self.to_pandas().pivot_table(metric, "row", "column", sort=False).round(3)


@dataclass(frozen=True, eq=False, repr=False)
class AdaptationResult:
    """Result of `adapt`.

    Attributes:
        frame: one row per stream and rule: the metric with its interval over users, harm, regret, cost.
        users: one row per user, seed, stream and rule.
        directory: directory of all results.
        metric: name of the study's metric.
        reasons: what ``auto`` chose and why, one sentence per training run.
    """

    frame: pd.DataFrame
    users: pd.DataFrame
    directory: Path
    metric: str
    reasons: tuple[str, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """The summary, one row per stream and rule."""
        return self.frame

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._headline())}</p>{self._shown().to_html(index=False)}"

    def _headline(self) -> str:
        text = f"Online rules on the streams of {self.frame['users'].max()} users not seen in training"
        return "\n".join([text, *self.reasons])

    def _shown(self) -> pd.DataFrame:
        columns = ["stream", "rule", self.metric, "low", "high", "worst_decile", "harmed", "gain", "p_adjusted"]
        return self.frame[columns].round(3)
