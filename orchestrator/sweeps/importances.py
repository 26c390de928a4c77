"""How much of what separates good runs from the others each key explains, by Optuna's PED-ANOVA."""

from __future__ import annotations

import math

from orchestrator.sweeps.sweep_record import SweepRecord

_LEAST = 6  # runs with an objective, below which the figures mean nothing


def importances(record: SweepRecord) -> dict[str, float] | str:
    """Return the share of each key, all together 1; or why there is none.

    Args:
        record: of the sweep.
    """
    keys = record.keys
    done = [job for job in record.jobs if job.status == "finished" and job.objective is not None]
    done = [job for job in done if all(key in job.values for key in keys)]
    if len(keys) < 2:
        return "The sweep has one key."
    if len(done) < _LEAST:
        return f"They need {_LEAST} finished runs; there are {len(done)}."
    try:
        import optuna
        from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    except ModuleNotFoundError:
        return "They need the package 'optuna'."
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    domains: dict[str, BaseDistribution] = {}
    for key in keys:
        of_interval = record.space.get(key, {})
        if "low" in of_interval:
            domains[key] = FloatDistribution(of_interval["low"], of_interval["high"], log=of_interval["log"])
        else:
            domains[key] = CategoricalDistribution(sorted({job.values[key] for job in done}))
    if all(isinstance(domain, CategoricalDistribution) and len(domain.choices) < 2 for domain in domains.values()):
        return "All runs have the same values."
    study = optuna.create_study(direction="minimize" if record.lower_is_better else "maximize")
    for job in done:
        values = {
            key: float(job.values[key]) if "low" in record.space.get(key, {}) else job.values[key] for key in keys
        }
        study.add_trial(optuna.trial.create_trial(params=values, distributions=domains, value=job.objective))
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    if not all(math.isfinite(share) for share in shares.values()):
        return "They cannot be told apart by these runs."
    return {key: float(share) for key, share in shares.items()}
