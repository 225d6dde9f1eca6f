"""From a DataFrame to recommendations.

python python_examples/02_train_and_recommend.py [--minutes 1]
"""

from __future__ import annotations

import argparse

import pandas as pd

from recgrela_ext import Interactions, RecGRELA, evaluate, fit
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.evaluation import format_recommendations, format_table, recommend_for_users


def made_up_plays(users: int) -> pd.DataFrame:
    """A log as you may have one: who played which song, and when."""
    log, _ = make_synthetic(num_users=users, num_items=240, mean_length=40)
    titles = log.item_titles or {}
    return pd.DataFrame(
        {
            "listener": [f"user-{raw}" for raw in log.user_ids[log.user]],
            "song": [titles[raw] for raw in log.item_ids[log.item].tolist()],
            "played_at": pd.to_datetime(log.time, unit="s"),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--out", default="my-model", help="folder of the saved model")
    options = parser.parse_args()
    df = made_up_plays(options.users)
    print(df.head(), "\n")

    log = Interactions.from_frame(df, user="listener", item="song", time="played_at")
    train, valid, test = log.leave_one_out()
    model = RecGRELA.for_data(train, num_layers=2)
    fit(model, train, valid, minutes=options.minutes)
    print(format_table(evaluate(model, test, baselines=train)), "\n")
    print(format_recommendations(recommend_for_users(model, log.sequences(), ["user-7"], k=5)))

    model.save_pretrained(options.out)
    again = RecGRELA.from_pretrained(options.out)
    print(f"\nsaved in {options.out} and loaded again: {again.config.num_items} items")


if __name__ == "__main__":
    main()
