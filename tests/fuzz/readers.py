"""Files of events: `Interactions.from_file` on anything, in every format."""

from __future__ import annotations

import gzip
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recgrela_ext import DataError, Interactions
from tests.fuzz.draw import INTERESTING, REFUSED, Draw, one_line

# file name, format, a file that can be read
FILES: tuple[tuple[str, str, bytes], ...] = (
    ("x.inter", "auto", b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
     b"7\t30\t4\t100\n7\t31\t3\t101.5\n8\t30\t1\t99\n"),
    ("x.csv", "auto", b'user,item,time\nann,"a,b",2020-01-02\nbob,c,2020-01-03T04:05:06\n'),
    ("x.csv", "auto", b"user;item;time\n1;2;3\n4;5;6\n1;5;1e3\n"),
    ("ratings.dat", "auto", b"1::10::5::978300760\n1::11::3::978302109\n2::10::4::978301968\n"),
    ("u.data", "auto", b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"),
    ("combined_data_1.txt", "auto", b"1:\n14,3,2005-09-06\n15,5,2005-05-13\n2:\n14,4,2005-10-19\n"),
    ("LFM-1b_LEs.txt", "auto", b"31\t2\t3\t4\t1385212958\n31\t5\t6\t7\t1385212642\n"),
    ("user_log_format1.csv", "auto", b"user_id,item_id,cat_id,seller_id,brand_id,time_stamp,"
     b"action_type\n328862,323294,833,2882,2661,829,0\n328862,844400,1271,2882,2661,829,2\n"),
    ("x.tsv", "csv", b"user\titem\ttimestamp\ttitle\n1\t2\t3\tx\n1\t4\t5\ty\n"),
    ("x.parquet", "auto", b""),  # `parquet` makes it
)  # fmt: skip
TITLES: tuple[tuple[str, bytes], ...] = (
    ("x.item", b"item_id:token\tmovie_title:token_seq\n30\tToy Story\n31\tHeat\n"),
    ("movies.dat", b"10::Toy Story (1995)::Animation\n11::Heat::Action\n"),
    ("u.item", b"242|Kolya (1996)|24-Jan-1997\n302|L.A. Confidential|01-Jan-1997\n"),
    ("movie_titles.csv", b"1,2003,Dinosaur Planet\n2,2004,Isle of Man, 2004\n"),
)
TYPES = (
    None, None, pa.int8(), pa.uint64(), pa.float32(), pa.string(), pa.large_string(), pa.binary(),
    pa.bool_(), pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32(), pa.duration("s"),
    pa.list_(pa.int64()), pa.decimal128(20, 2),
)  # fmt: skip
ORDERS = ("hash", "file", "item_id", "recbole_float32", "shuffled")


class Readers:
    """Data: format, edited or raw, titles beside it, order; the rest is the file or the edits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parquet = parquet({"user": [1, 1, 2], "item": ["a", "b", "a"], "time": [3, 1, 2]})

    def __call__(self, data: bytes) -> str:
        draw = Draw(data)
        name, kind, good = draw.one_of(FILES)
        order, zipped, titles = draw.one_of(ORDERS), draw.byte() % 16 == 0, draw.byte() % 4 == 0
        beside: list[Path] = []
        if titles:
            title_name, title = draw.one_of(TITLES)
            beside.append(self.folder / title_name)
            beside[0].write_bytes(draw.edited(title))
        if name.endswith(".parquet"):
            content = drawn_table(draw) if draw.flag() else draw.edited(self.parquet)
        else:
            content = draw.edited(good) if draw.flag() else draw.rest()
        if zipped:
            name += ".gz"
            content = gzip.compress(content, 1)
            content = draw.edited(content) if draw.flag() else content
        path = self.folder / name
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                accepted = self.read(path, kind, order)
            return f"*{''.join(path.suffixes)}" if accepted else REFUSED
        finally:
            for one in (path, *beside):
                one.unlink()

    @staticmethod
    def read(path: Path, kind: str, order: str) -> bool:
        """Whether it can be read; then it must also be what it says."""
        try:
            log = Interactions.from_file(path, format=kind, order=order, progress=False)
        except DataError as error:
            one_line(error)
            return False
        assert len(log.user) == len(log.item) > 0
        assert log.user.min() >= 0
        assert log.user.max() == log.num_users - 1
        assert log.item.min() >= 0
        assert log.item.max() == log.num_items - 1
        if log.time is not None:
            assert np.isfinite(log.time).all()
        log.order_rows(warn=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # ties in time
                train, _, test = log.leave_one_out()
        except DataError:
            return True
        assert len(test) >= 1
        assert train.offsets[-1] == len(train.items)
        return True


def parquet(columns: dict[str, Any]) -> bytes:
    """A Parquet file without compression, whose bytes an edit reaches."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="none")
    return file.getvalue()


def drawn_table(draw: Draw) -> bytes:
    """Columns of drawn values and types; those that Parquet cannot hold are whole numbers."""
    columns: dict[str, Any] = {}
    for name in ("user", "item", "time", "title")[: 1 + draw.below(4)]:
        mixed = draw.below(4) == 0
        choices = INTERESTING if mixed else (draw.one_of(INTERESTING),) * 2
        values = [draw.one_of(choices) for _ in "abc"]
        try:
            columns[name] = pa.array(values, draw.one_of(TYPES))
            parquet({name: columns[name]})
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            columns[name] = pa.array([draw.below(3) for _ in "abc"])
    return parquet(columns)
