"""Optuna's tree-structured Parzen estimator: told how the trials so far went, and asked for the next point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from rcl_fast.train.experiments.search_space import Range, Space, Values
from rcl_fast.train.experiments.study import Trial, best_validation


def ask(space: Space, trials: Sequence[Trial]) -> dict[str, Any]:
    """Returns the next point of a space. It depends on the trials' folders alone, whoever asks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Trials under way count as bad ones: several that are asked for at once then don't all try the same.
    study = optuna.create_study(sampler=TPESampler(seed=len(trials), constant_liar=True), direction="maximize")
    distributions = {name: _distribution(of) for name, of in space.items()}
    for trial in trials:
        if trial.parameters:  # else its file is damaged
            study.add_trial(_told(trial, distributions))
    return study.ask(distributions).params


def _told(trial: Trial, distributions: dict[str, BaseDistribution]) -> optuna.trial.FrozenTrial:
    value = best_validation(trial.folder)["balanced_accuracy"] if trial.status == "finished" else None
    state = TrialState.COMPLETE if value is not None else TrialState.FAIL if trial.is_over else TrialState.RUNNING
    return optuna.trial.create_trial(state=state, value=value, params=trial.parameters, distributions=distributions)


def _distribution(of: Values | Range) -> BaseDistribution:
    if isinstance(of, Values):
        return CategoricalDistribution(of.values)
    if isinstance(of.low, int) and isinstance(of.high, int):
        return IntDistribution(of.low, of.high, log=of.log)
    return FloatDistribution(of.low, of.high, log=of.log)
