"""Full-ranking evaluation, counting baselines and top-k lists."""

from recgrela_ext.evaluation.baselines import Markov, Popularity
from recgrela_ext.evaluation.evaluate import evaluate
from recgrela_ext.evaluation.metrics import bootstrap_interval, mean_metrics, metric_values
from recgrela_ext.evaluation.ranking import Ranks, Scorer, rank_targets
from recgrela_ext.evaluation.recommend import (
    format_recommendations,
    recommend_for_items,
    recommend_for_users,
)
from recgrela_ext.evaluation.result import combine_seeds, format_table, machine_info, write_result

__all__ = [
    "Markov",
    "Popularity",
    "Ranks",
    "Scorer",
    "bootstrap_interval",
    "combine_seeds",
    "evaluate",
    "format_recommendations",
    "format_table",
    "machine_info",
    "mean_metrics",
    "metric_values",
    "rank_targets",
    "recommend_for_items",
    "recommend_for_users",
    "write_result",
]
