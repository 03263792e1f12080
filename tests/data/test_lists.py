"""Reading of list files: every published format, and every way in which a list can be wrong."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeitlt.data.sets.lists import read_list
from fastdeitlt.errors import UserError

LISTS = Path(__file__).parents[1] / "data" / "lists"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "images", "classes", "largest", "smallest", "first"),
    [
        ("Places_LT_train", 62_500, 365, 4980, 5, "data_256/a/airfield/00004851.jpg"),
        ("Places_LT_val", 7_300, 365, 20, 20, "data_256/a/airfield/00002049.jpg"),
        ("ImageNet_LT_val", 20_000, 1000, 20, 20, "train/n01440764/n01440764_762.JPEG"),
    ],
)
def test_published_lists_have_their_known_totals(tmp_path, name, images, classes, largest, smallest, first):
    file = write(tmp_path / f"{name}.txt", gzip.decompress((LISTS / f"{name}.txt.gz").read_bytes()))
    found = read_list(file, "/images")
    assert (len(found), found.num_classes, max(found.counts), min(found.counts)) == (images, classes, largest, smallest)
    assert found.paths[0] == first
    assert sum(found.counts) == images
    assert found.root == "/images"


def test_inaturalist_list_keeps_labels_beside_their_paths():
    found = read_list(LISTS / "iNaturalist18_val_head.txt", "/images", num_classes=8142)
    assert len(found) == 200
    assert found.num_classes == 8142
    assert all(path.split("/")[2] == str(label) for path, label in zip(found.paths, found.labels, strict=True))


NAMES = st.lists(st.text("abc äé日.-_ ", min_size=1).map(str.strip).filter(lambda s: s and ".." not in s), min_size=1)


@settings(max_examples=50, deadline=None)
@given(names=NAMES, data=st.data(), end=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]), gap=st.sampled_from([" ", "\t"]))
def test_any_name_with_spaces_comes_back(tmp_path_factory, names, data, end, gap):
    labels = [data.draw(st.integers(0, 30)) for _ in names]
    rows = (f"{name}{gap}{label}{end}" for name, label in zip(names, labels, strict=True))
    found = read_list(write(tmp_path_factory.mktemp("l") / "l.txt", "".join(rows)), "")
    assert found.paths == names
    assert found.labels.tolist() == labels
    assert len(found.counts) == max(labels) + 1


@pytest.mark.parametrize(
    "text",
    ["\ufeffa b.jpg 0\nc.jpg 2", "a b.jpg 0\r\nc.jpg 2\r\n", "\n  a b.jpg   0 \n\n \nc.jpg\t2\n\n"],
    ids=["byte-order-mark", "crlf", "blank-lines"],
)
def test_untidy_text_is_read(tmp_path, text):
    found = read_list(write(tmp_path / "l.txt", text), "")
    assert found.paths == ["a b.jpg", "c.jpg"]
    assert found.labels.tolist() == [0, 2]
    assert found.counts == [1, 0, 1]


@pytest.mark.parametrize(
    "name",
    ["../secret.jpg", "a/../../b.jpg", "a/..", "/etc/passwd", "..\\b.jpg", "a\\b.jpg", "C:/b.jpg", "C:b.jpg", "a\0b"],
)
@pytest.mark.parametrize("suffix", ["txt", "csv", "json"])
def test_paths_that_leave_the_root_are_refused_with_their_line(tmp_path, name, suffix):
    rows = [("ok.jpg", 0), ("also..ok/x.jpg", 1), (name, 0)]
    content = {
        "txt": "".join(f"{path} {label}\n" for path, label in rows),
        "csv": "path,label\n" + "".join(f"{path},{label}\n" for path, label in rows),
        "json": json.dumps([{"path": path, "label": label} for path, label in rows]),
    }[suffix]
    where = {"txt": "line 3", "csv": "line 4", "json": "annotation 2"}[suffix]
    with pytest.raises(UserError, match=f"{where}: got the path .*expected one relative to data.root, with /") as error:
        read_list(write(tmp_path / f"l.{suffix}", content), "/images")
    assert "\n" not in str(error.value)


def test_dots_inside_names_are_fine(tmp_path):
    names = ["a..b.jpg", "./a.jpg", "a/...jpg", "at 10:30.jpg", ".hidden/a.jpg"]
    found = read_list(write(tmp_path / "l.txt", "".join(f"{name} 0\n" for name in names)), "")
    assert found.paths == names


@pytest.mark.parametrize("label", ["-1", "1.0", "cat", "1e3", "0x1", "1_0", "+1", "²", "99999999999999999999999", "٣"])
def test_labels_that_are_no_class_index_are_refused_with_their_line(tmp_path, label):
    with pytest.raises(UserError, match="line 2: got the label"):
        read_list(write(tmp_path / "l.txt", f"a.jpg 0\nb.jpg {label}\n"), "")


def test_absurd_label_is_refused_before_counts_are_allocated(tmp_path):
    with pytest.raises(UserError, match="line 1: got the label 4000000000, expected a class index below 1000000"):
        read_list(write(tmp_path / "l.txt", "a.jpg 4000000000\n"), "")


def test_label_beyond_the_given_classes_is_refused(tmp_path):
    file = write(tmp_path / "l.txt", "a 0\nb 5\nc 3\n")
    assert read_list(file, "", num_classes=6).counts == [1, 0, 0, 1, 0, 1]
    with pytest.raises(UserError, match="line 2: got the label 5, expected a class index below 5"):
        read_list(file, "", num_classes=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "", "empty, expected one image per line"),
        ("l.txt", "\n \n\r\n", "empty, expected one image per line"),
        ("l.csv", "path,label\n", "empty, expected one image per line"),
        ("l.json", "[]", "empty, expected one image per line"),
        ("l.txt", "a.jpg 0\nb.jpg\n", "line 2: got 'b.jpg', expected 'relpath label'"),
        ("l.txt", b"a.jpg 0\nb\xff.jpg 1\n", "line 2: byte 0xff is not UTF-8"),
        ("l.txt", "a.jpg 0\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("l.tfrecord", "x", "suffix '.tfrecord', expected .txt, .csv or .json"),
        ("l.csv", "", "line 1: got the header"),
        ("l.csv", "a.jpg,0\n", "line 1: got the header .*expected a column path"),
        ("l.csv", "path;label\na.jpg;0\n", "expected a column path .*, separated by commas"),
        ("l.csv", "path,label,Split\na,0,train\nb,1,test\n", "got images of the splits 'test', 'train', expected one"),
        ("l.csv", "path,label\na,b.jpg,0\n", "line 2: got 3 fields, expected 2. Quote"),
        ("l.csv", "path,label\na.jpg,0\nb.jpg,\n", "line 3: got the label ''"),
        ("l.csv", "path,label\na.jpg,0\nb.jpg,cat\n", "line 3: got the label 'cat'"),
        ("l.csv", "path,label\na.jpg,-1\n", "line 2: got the label '-1'"),
        ("l.csv", "path,label\na.jpg,1.5\n", "line 2: got the label '1.5'"),
        ("l.csv", "path,label\n,1\n", "line 2: got the path ''"),
        ("l.csv", 'path,label\n"a.jpg,1\n', "not valid csv"),
        (
            "l.json",
            '[{"path": "a", "label": 0, "split": 0}, {"path": "b", "label": 1, "split": 1}]',
            "got images of the",
        ),
        ("l.json", "{", "not valid json"),
        ("l.json", "[" * 200_000, "not valid json"),
        ("l.json", "3", "expected a list of"),
        ("l.json", '{"images": []}', "expected a list of"),
        ("l.json", '[{"path": "a"}]', "annotation 0: KeyError.*label"),
        ("l.json", '[{"path": "a", "label": 0}, 5]', "annotation 1: TypeError"),
        ("l.json", '[{"path": 5, "label": 0}]', "annotation 0: TypeError path 5"),
        ("l.json", '[{"path": "a", "label": [0]}]', "annotation 0: TypeError"),
        ("l.json", '[{"path": "a", "label": true}]', "annotation 0: got the label True"),
        ("l.json", '[{"path": "a", "label": 0.5}]', "annotation 0: TypeError"),
        ("l.json", '[{"path": "a", "label": "b\\ud800"}]', "got the class name .*valid UTF-8"),
        ("l.json", '[{"path": "a\\ud800", "label": 0}]', "annotation 0: got the path .*valid UTF-8"),
        ("l.json", '{"images": [{"id": 1}], "annotations": []}', "KeyError"),
        (
            "l.json",
            '{"annotations": [{"path": "a", "label": 3}], "categories": [{"id": 1}, {"id": 2}]}',
            "annotation 0: got the label 3, expected the id of a category",
        ),
        (
            "l.json",
            '{"annotations": [{"path": "a", "label": 1}], "categories": [{"id": 1}, {"id": 1}]}',
            "got several categories with id 1, expected one",
        ),
        (
            "l.json",
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "category_id": 0}]}',
            "annotation 0: KeyError 2",
        ),
    ],
)
def test_faulty_lists_give_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_list(write(tmp_path / name, content), "")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_missing_list_and_folder_as_list_are_errors_of_the_user(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_list(tmp_path / "l.txt", "")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(UserError, match="directory"):
        read_list(tmp_path / "d.txt", "")


@pytest.mark.parametrize("header", ["path,label", "image,class", "Label, Image", "id,filename,category"])
def test_csv_columns_are_found_by_name(tmp_path, header):
    names = [name.strip().lower() for name in header.split(",")]
    cells = {"id": "9", "label": "2", "class": "2", "category": "2"}
    rows = "".join(",".join(cells.get(n, '"a, b.jpg"') for n in names) + "\n" for _ in range(2))
    found = read_list(write(tmp_path / "l.csv", f"{header}\n{rows}"), "")
    assert found.paths == ["a, b.jpg"] * 2
    assert found.labels.tolist() == [2, 2]


def test_csv_class_names_are_numbered_in_sorted_order(tmp_path):
    found = read_list(write(tmp_path / "l.csv", "path,label\n1.jpg,dog\n2.jpg,Ant eater\n3.jpg,dog\n"), "")
    assert found.class_names == ["Ant eater", "dog"]
    assert found.labels.tolist() == [1, 0, 1]
    assert found.counts == [1, 2]


def test_inaturalist_json_joins_annotations_to_images(tmp_path):
    tree = {
        "info": {},
        "images": [{"id": 11, "file_name": "x/1.jpg", "width": 8}, {"id": 5, "file_name": "x/2.jpg"}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 2}, {"id": 2, "image_id": 11, "category_id": 0}],
        "categories": [{"id": i, "name": f"species {i}"} for i in (2, 0, 1, 3)],
    }
    found = read_list(write(tmp_path / "train2018.json", json.dumps(tree)), "r")
    assert found.paths == ["x/2.jpg", "x/1.jpg"]
    assert found.labels.tolist() == [2, 0]
    assert found.counts == [1, 0, 1, 0]
    assert found.class_names == ["species 0", "species 1", "species 2", "species 3"]


@pytest.mark.parametrize("ids", [[1, 2, 3], [2, 9, 5], ["x", "z", "y"]])
def test_json_categories_with_other_ids_are_classes_in_their_order(tmp_path, ids):
    rows = [{"path": f"{key}.jpg", "category_id": key} for key in (ids[2], ids[0])]
    tree = {"annotations": rows, "categories": [{"id": key, "name": f"n{key}"} for key in ids]}
    found = read_list(write(tmp_path / "l.json", json.dumps(tree)), "")
    assert found.labels.tolist() == [2, 0] and found.counts == [1, 0, 1]
    assert found.class_names == [f"n{key}" for key in ids]


def test_json_labels_may_be_names_of_categories(tmp_path):
    tree = {
        "annotations": [{"path": "a", "label": "x"}],
        "categories": [{"id": 3, "name": "y"}, {"id": 1, "name": "x"}],
    }
    found = read_list(write(tmp_path / "l.json", json.dumps(tree)), "")
    assert found.labels.tolist() == [1] and found.class_names == ["y", "x"]


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    found = read_list(write(tmp_path / "l.csv", "path,label\n1.jpg,caf\u00e9\n2.jpg,cafe\u0301\n3.jpg,tea\n"), "")
    assert found.counts == [2, 1] and found.class_names == ["caf\u00e9", "tea"]


def test_bag_of_tricks_json_takes_its_class_number(tmp_path):
    rows = [{"image_id": 3, "fpath": "a.jpg", "im_height": 2, "im_width": 2, "category_id": 1}]
    found = read_list(write(tmp_path / "l.json", json.dumps({"annotations": rows, "num_classes": 4})), "")
    assert found.paths == ["a.jpg"]
    assert found.counts == [0, 1, 0, 0]


def test_plain_json_takes_class_names(tmp_path):
    rows = [{"path": "a.jpg", "label": "z"}, {"path": "b.jpg", "label": "b"}]
    found = read_list(write(tmp_path / "l.json", json.dumps(rows)), "")
    assert found.labels.tolist() == [1, 0]
    assert found.class_names == ["b", "z"]
