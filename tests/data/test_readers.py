from __future__ import annotations

import gzip

import numpy as np
import pytest

from recgrela_ext.data import Interactions, readers
from recgrela_ext.errors import DataError

pandas = pytest.importorskip("pandas")

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def events(log):
    """(user, item, time) triples with raw ids, in file order."""
    time = [None] * len(log) if log.time is None else log.time.tolist()
    users, items = log.user_ids[log.user].tolist(), log.item_ids[log.item].tolist()
    return list(zip(users, items, time, strict=True))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_recbole_with_titles(tmp_path):
    path = write(tmp_path / "set.inter", INTER + "7\t30\t4\t100\n7\t10\t1\t101.5\n8\t30\t2\t99\n")
    write(tmp_path / "set.item", "item_id:token\tmovie_title:token_seq\n10\tÉ\n30\tB\n99\tC\n")
    log = Interactions.from_file(path)
    assert events(log) == [(7, 30, 100.0), (7, 10, 101.5), (8, 30, 99.0)]
    assert log.time.dtype == np.float64
    assert log.item_titles == {10: "É", 30: "B"}
    assert log.name == "set"
    assert events(Interactions.from_file(tmp_path)) == events(log)


def test_recbole_merged_lfm_artists_and_tmall(tmp_path):
    header = "user_id:token\tartists_id:token\ttimestamp:float\tnum_repeat:float\n"
    artists = write(tmp_path / "lfm1b-artists.inter", header + "1\ta5\t10\t3\n1\ta6\t11\t1\n")
    assert events(Interactions.from_file(artists)) == [(1, "a5", 10), (1, "a6", 11)]
    header = "user_id:token\tseller_id:token\tcategory_id:token\ttimestamp:float\n"
    shops = write(tmp_path / "tmall-buy.inter", header + "1\t2\t3\t829\n")
    assert events(Interactions.from_file(shops, item="category_id")) == [(1, 3, 829)]
    assert events(Interactions.from_file(shops)) == [(1, 2, 829)]


def test_movielens_dat(tmp_path):
    write(tmp_path / "ml-1m" / "ratings.dat", "1::1193::5::978300760\n6040::661::3::978302109")
    write(tmp_path / "ml-1m" / "movies.dat", "661::Misérables (1995)::Drama\n".encode("latin-1"))
    log = Interactions.from_file(tmp_path / "ml-1m")
    assert events(log) == [(1, 1193, 978300760), (6040, 661, 978302109)]
    assert log.time.dtype == np.int64
    assert log.name == "ml-1m"
    assert log.item_titles == {661: "Misérables (1995)"}
    half_stars = write(tmp_path / "ml-10m" / "ratings.dat", "1::122::4.5::838985046\n")
    assert events(Interactions.from_file(half_stars)) == [(1, 122, 838985046)]


def test_movielens_csv_and_gzip(tmp_path):
    text = "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n1,25,1.0,944250228\n"
    path = write(tmp_path / "ml-32m" / "ratings.csv", text)
    write(tmp_path / "ml-32m" / "movies.csv", 'movieId,title,genres\n17,"A, B (1995)",Drama\n')
    log = Interactions.from_file(path)
    assert events(log) == [(1, 17, 944249077), (1, 25, 944250228)]
    assert log.item_titles == {17: "A, B (1995)"}
    assert log.name == "ml-32m"
    packed = write(tmp_path / "other.csv.gz", gzip.compress(text.encode()))
    assert events(Interactions.from_file(packed)) == events(log)


def test_movielens_100k(tmp_path):
    write(tmp_path / "u.data", "196\t242\t3\t881250949\n")
    write(tmp_path / "u.item", "242|Kolya (1996)|24-Jan-1997\n")
    log = Interactions.from_file(tmp_path)
    assert events(log) == [(196, 242, 881250949)]
    assert log.item_titles == {242: "Kolya (1996)"}


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_netflix(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK_ROWS", chunk)
    write(tmp_path / "a" / "combined_data_1.txt", "1:\n14,3,2005-09-06\n15,5,1970-01-02\n2:\n")
    write(tmp_path / "a" / "combined_data_2.txt", "3:\n14,4,1970-01-01")
    write(tmp_path / "a" / "movie_titles.csv", b"1,2003,Dinosaur, Planet\n3,NULL,Caf\xe9\n")
    log = Interactions.from_file(tmp_path / "a")
    expected = [(14, 1, 13032), (15, 1, 1), (14, 3, 0)]
    assert events(log) == expected
    assert log.item_titles == {1: "Dinosaur, Planet", 3: "Café"}
    write(tmp_path / "b" / "mv_0000001.txt", "1:\n14,3,2005-09-06\n15,5,1970-01-02\n")
    write(tmp_path / "b" / "mv_0000003.txt", "3:\n14,4,1970-01-01\n")
    assert events(Interactions.from_file(tmp_path / "b")) == expected


def test_lfm_listening_events(tmp_path):
    path = write(tmp_path / "LFM-1b_LEs.txt", "31435\t15\t4\t4\t1385212958\n31435\t15\t4\t9\t1\n")
    write(tmp_path / "LFM-1b_artists.txt", "15\tThe Band\n")
    log = Interactions.from_file(path)
    assert events(log) == [(31435, 15, 1385212958), (31435, 15, 1)]
    assert log.item_titles == {15: "The Band"}
    assert events(Interactions.from_file(path, item="track")) == [
        (31435, 4, 1385212958),
        (31435, 9, 1),
    ]
    assert events(log.first_events()) == [(31435, 15, 1)]


def test_tmall_log_and_keep(tmp_path):
    header = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
    path = write(
        tmp_path / "user_log_format1.csv",
        header + "328862,323294,833,2882,,829,0\n328862,5,1271,2882,2661,830,2\n",
    )
    assert events(Interactions.from_file(path)) == [(328862, 323294, 829), (328862, 5, 830)]
    bought = Interactions.from_file(path, keep={"action_type": [2]})
    assert events(bought) == [(328862, 5, 830)]
    assert bought.num_items == 1
    assert events(Interactions.from_file(path, keep={"action_type": "2"})) == events(bought)
    with pytest.raises(DataError, match="left by keep="):
        Interactions.from_file(path, keep={"action_type": ["9"]})
    with pytest.raises(DataError, match="column 'kind' is missing"):
        Interactions.from_file(path, keep={"kind": ["9"]})


def test_any_csv_and_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(
        {
            "who": ["b;1", "a", "a"],
            "what": [10, 30, 20],
            "when": ["2020-03-01", "2020-01-02T10:00:00", "2020-02-01"],
            "rest": [1, 2, 3],
        }
    )
    names = {"user": "who", "item": "what", "time": "when"}
    frame.to_csv(tmp_path / "log.csv", index=False, sep=";")
    frame.assign(when=pandas.to_datetime(frame["when"], format="ISO8601")).to_parquet(
        tmp_path / "log.parquet"
    )
    csv = Interactions.from_file(tmp_path / "log.csv", **names)
    parquet = Interactions.from_file(tmp_path / "log.parquet", **names)
    assert [event[:2] for event in events(csv)] == [("b;1", 10), ("a", 30), ("a", 20)]
    assert events(parquet) == events(csv)
    kept = Interactions.from_file(tmp_path / "log.parquet", keep={"rest": [2]}, **names)
    assert [event[:2] for event in events(kept)] == [("a", 30)]


def test_file_order_without_time(tmp_path):
    path = write(tmp_path / "log.csv", "user,item\n1,5\n1,4\n")
    with pytest.raises(DataError, match=r"time column is missing .* or order='file'"):
        Interactions.from_file(path)
    assert events(Interactions.from_file(path, order="file")) == [(1, 5, None), (1, 4, None)]
    timed = write(tmp_path / "timed.csv", "user,item,time\n1,5,9\n1,4,1\n")
    assert Interactions.from_file(timed, order="file", time="").time is None


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_agree_and_ids_stay_exact(tmp_path, monkeypatch, chunk):
    rng = np.random.default_rng(0)
    rows = [(f"0{u}", int(i), t) for t, (u, i) in enumerate(rng.integers(0, 9, (50, 2)))]
    text = "".join(f"{u}\t{i}\t1\t{t}\n" for u, i, t in rows)
    path = write(tmp_path / "x.inter", INTER + text)
    monkeypatch.setattr(readers, "CHUNK_ROWS", chunk)
    assert events(Interactions.from_file(path)) == rows  # 01 is not 1


def test_integers_and_text_ids_do_not_depend_on_the_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_ROWS", 2)
    path = write(tmp_path / "x.csv", "user,item,time\n1,2,3\n1,3,4\n1,x,5\nNA,2,6\n")
    log = Interactions.from_file(path)
    assert log.item_ids.tolist() == ["2", "3", "x"]
    assert log.user_ids.tolist() == ["1", "NA"]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.csv", b"\xef\xbb\xbfuser,item,time\r\n1,2,3\r\n")
    assert events(Interactions.from_file(path)) == [(1, 2, 3)]


def test_progress_bar_counts_bytes(tmp_path, capsys):
    path = write(tmp_path / "x.csv", "user,item,time\n" + "1,2,3\n" * 500)
    Interactions.from_file(path, progress=True)
    assert "3.02k/3.02k" in capsys.readouterr().err
    Interactions.from_file(path)
    assert capsys.readouterr().err == ""


GOOD = "7\t30\t4\t100\n"
BAD_FILES = {
    "empty": ("x.inter", "", "empty file"),
    "header only": ("x.inter", INTER, "must hold events, got a file without any"),
    "header only, csv": ("x.csv", "user,item,time\n\n", "must hold events"),
    "missing column": (
        "x.csv",
        "person,item,time\n1,2,3\n",
        r"the user column is missing \(pass user=\); the columns are person, item, time",
    ),
    "not UTF-8": (
        "x.inter",
        (INTER + GOOD).encode() + b"7\t3\xff\t1\t1\n",
        f"byte 0xff at byte offset {len(INTER + GOOD) + 3}",
    ),
    "not UTF-8 in the header": ("x.csv", b"us\xe9r,item\n", "byte 0xe9 at byte offset 2"),
    "truncated UTF-8": ("x.csv", b"user,item,time\n1,2,3\n1,2\xc3", "at byte offset 24"),
    "zeros at the end": ("x.csv", "user,item,time\n1,2,3\n1,2\0\0", "zero byte at byte offset 24"),
    "lines end in CR": ("x.csv", "user,item,time\r1,2,3\r", "must begin with a header line"),
    "endless header": ("x.csv", "user,item," + "x" * 200_000, "must begin with a header line"),
    "negative id": ("x.inter", INTER + GOOD + "-1\t3\t1\t1\n", "user ids must lie in .* got -1"),
    "gigantic id": (
        "x.inter",
        INTER + "7\t99999999999999999999\t1\t1\n",
        "item ids must lie in .* got 99999999999999999999",
    ),
    "long id": ("x.csv", "user,item,time\n" + "u" * 999 + ",1,1\n", "got 999"),
    "no id": ("x.inter", INTER + GOOD + "\t3\t1\t1\n", "user must not be missing.*in line 3"),
    "NaN time": (
        "x.inter",
        INTER + GOOD + "7\t31\t1\tnan\n7\t32\t1\t\n",
        "time must not be missing, got 2 missing, the first in line 3",
    ),
    "time in words": ("x.csv", "user,item,time\n1,2,3\n1,2,later\n", "'later' in line 3"),
    "too few fields": ("x.csv", "user,item,time\n1,2,3\n1\n", "missing.*line 3"),
    "comma in a title": ("x.csv", "user,t,item,time\n1,a,2,3\n1,b, c,4,5\n", "4 fields.*line 3"),
    "numbers alone": ("x.csv", "user,item,time\n1,8,5,100\n", "3 fields, got more in line 2"),
    "wide .inter": (
        "x.inter",
        "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\t4\n",
        "3 fields.*line 2",
    ),
    "wide u.data": ("u.data", "1\t2\t3\t4\n1\t3\t9\t3\t5\n", "4 fields, got more in line 2"),
    "unknown format": ("x.xyz", "1 2 3\n", "the format of x.xyz must be known"),
    "not ::": ("ratings.dat", "1::2::3\n", "user::item::rating::time"),
    "LFM columns": ("LFM-1b_LEs.txt", "1\t2\t3\n", "5 tab-separated columns .* got 3"),
    "Netflix without movie": ("combined_data_1.txt", "14,3,2005-09-06\n", "must name a movie"),
    "Netflix date": ("combined_data_1.txt", "1:\n14,3,soon\n", "YYYY-MM-DD, got 'soon'"),
    "not gzip": ("x.csv.gz", "user,item,time\n", "must be readable"),
    "not Parquet": ("x.parquet", "PAR", "must be a Parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_clear_line(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        Interactions.from_file(path)
    text = str(caught.value)
    assert "\n" not in text
    assert name.removesuffix(".gz").partition(".")[0] in text


def test_a_separator_at_the_end_of_every_row(tmp_path):
    path = write(tmp_path / "x.csv", "user,item,time\n1,2,3,\n1,4,5,\n")
    assert Interactions.from_file(path).time.tolist() == [3, 5]


def test_non_utf8_offset_beyond_the_first_buffer(tmp_path):
    good = b"user,item,time\n" + b"1,2,3\n" * 400_000
    path = write(tmp_path / "x.csv", good + b"1,\xff,3\n")
    with pytest.raises(DataError, match=f"at byte offset {len(good) + 2}"):
        Interactions.from_file(path)


def test_line_numbers_count_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_ROWS", 4)
    path = write(tmp_path / "x.csv", "user,item,time\n" + "1,2,3\n" * 9 + "1,2,nan\n")
    with pytest.raises(DataError, match="in line 11"):
        Interactions.from_file(path)


def test_wrong_arguments_and_folders(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        Interactions.from_file(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="must hold a known file"):
        Interactions.from_file(tmp_path)
    path = write(tmp_path / "a.inter", INTER + GOOD)
    with pytest.raises(DataError, match="format must be 'auto' or one of recbole"):
        Interactions.from_file(path, format="excel")
    with pytest.raises(DataError, match="'visitor' is missing; the columns are user_id, item_id"):
        Interactions.from_file(path, user="visitor")
    write(tmp_path / "b.inter", INTER + GOOD)
    with pytest.raises(DataError, match=r"must hold one \*.inter, got a.inter, b.inter"):
        Interactions.from_file(tmp_path)


def test_missing_pandas_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    path = write(tmp_path / "a.inter", INTER + GOOD)
    with pytest.raises(DataError, match="needs pandas, try: pip install pandas"):
        Interactions.from_file(path)
