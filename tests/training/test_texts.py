"""Text of several domains: equal bytes for a seed, nothing of what is held out in training, documents that switch.

Python's own files and the licences of packages are the real ones; the message catalogues are of a made-up package.
"""

import ast
import gettext
import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import chain, combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from molora.training.examples import encode
from molora.training.recipes import documents, text_sources, texts
from molora.training.recipes.text_sources import MAX_CHARS, Source, messages, read_catalogue
from molora.training.recipes.texts import (
    DOMAINS,
    MIN_CHARS,
    NUM_PARTS,
    RUN,
    Split,
    build,
    distinct,
    distinct_passages,
    main,
    passages,
    split,
)

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")


def catalogue(translations: list[bytes], *, order: str = "<") -> bytes:
    """A compiled catalogue, laid out as GNU gettext's manual has it."""
    keys = [b"", *(b"message %d" % number for number in range(len(translations)))]
    values = [b"Content-Type: text/plain; charset=UTF-8\n", *translations]
    tables = [28, 28 + 8 * len(keys)]
    at, spans, blob = tables[1] + 8 * len(keys), [], b""
    for text in (*keys, *values):
        spans += [len(text), at + len(blob)]
        blob += text + b"\0"
    return (
        struct.pack(f"{order}7I", 0x950412DE, 0, len(keys), *tables, 0, 0)
        + struct.pack(f"{order}{len(spans)}I", *spans)
        + blob
    )


def sentences(rng: Random, num_sentences: int) -> list[bytes]:
    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=3))

    return [f"{' '.join(word() for _ in range(8))} äöü.".encode() for _ in range(num_sentences)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package that speaks several languages."""
    folder = tmp_path_factory.mktemp("site")
    files = [
        f"parrot/{part}/locale/{language}/LC_MESSAGES/parrot.mo"
        for part in ("shop", "mail", "help", "news", "maps", "game")
        for language in ("de", "fr", "it", "en_GB", "ru")
    ]
    for file in files:
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(catalogue(sentences(Random(file), 40)))
    info = folder / "parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "parrot/gone/locale/de/LC_MESSAGES/a.mo"]))
    return folder


@pytest.fixture(scope="module", autouse=True)
def speaking(site: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, list[Any]], dict[str, Split]]:
    return build(seed=0)


@pytest.fixture(scope="module")
def files(made: tuple[dict[str, list[Any]], dict[str, Split]]) -> dict[str, list[Any]]:
    return made[0]


@pytest.fixture(scope="module")
def splits(made: tuple[dict[str, list[Any]], dict[str, Split]]) -> dict[str, Split]:
    return made[1]


def runs(text: str) -> set[str]:
    found = re.findall(r"\w+", text.lower())
    return {" ".join(found[start : start + RUN]) for start in range(len(found) - RUN + 1)}


def test_one_seed_gives_one_set_of_bytes(files: dict[str, list[Any]], site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(site), *sys.path])
    subprocess.run(
        [sys.executable, "-m", "molora.training.recipes.texts", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "123"},
        check=True,
        timeout=300,
    )
    for name, records in files.items():
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == records
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert {name: file["num_records"] for name, file in recipe["files"].items()} == {
        name: len(records) for name, records in files.items()
    }
    assert set(recipe["sources"]) == set(DOMAINS)
    assert all(
        re.fullmatch("[0-9a-f]{64}", digest)
        for parts in recipe["sources"].values()
        for sources in parts.values()
        for digest in sources.values()
    )


def test_another_seed_holds_out_others(splits: dict[str, Split]) -> None:
    assert set(split("messages", 1).passages["held out"]) != set(splits["messages"].passages["held out"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_nothing_held_out_is_in_training(splits: dict[str, Split], domain: str) -> None:
    found = splits[domain]
    names = {part: {source.name for source in sources} for part, sources in found.sources.items()}
    texts = {part: set(chain.from_iterable(map(runs, found.passages[part]))) for part in found.passages}
    assert set(names) == {"train", "router", "val", "held out"}
    for a, b in combinations(names, 2):
        assert min(len(names[a]), len(names[b]), len(texts[a]), len(texts[b])) > 0
        assert not names[a] & names[b]
        assert not texts[a] & texts[b]


def test_sources_are_what_they_are_called(splits: dict[str, Split]) -> None:
    names = {
        domain: sorted(source.name for sources in found.sources.values() for source in sources)
        for domain, found in splits.items()
    }
    assert "argparse.py" in names["python"]
    assert "argparse" in names["prose"]
    assert any(re.fullmatch(r"numpy-.*\.dist-info/.*LICENSE.*", name) for name in names["legal"])
    assert not any("AUTHORS" in name for name in names["legal"])
    ours = [name for name in names["messages"] if name.startswith("parrot")]
    assert {name.split("/")[3] for name in ours} == {"de", "fr", "it"}
    assert len(ours) == 18


def test_code_is_whole_functions_without_docstrings(splits: dict[str, Split]) -> None:
    found = [ast.parse(text).body for text in chain.from_iterable(splits["python"].passages.values())]
    functions = [function for body in found for function in body]
    assert {type(function) for function in functions} == {ast.FunctionDef, ast.AsyncFunctionDef}
    assert {ast.get_docstring(function) for function in functions} == {None}
    assert any(function.decorator_list for function in functions)


def test_documents_switch_between_domains(files: dict[str, list[Any]], splits: dict[str, Split]) -> None:
    held_out = files["heldout.jsonl"]
    assert Counter(each["kind"] for each in held_out).keys() == {"mixed", "single"}
    used = Counter()
    for each in held_out:
        domains = [part["domain"] for part in each["parts"]]
        assert len({*domains}) >= 3 if each["kind"] == "mixed" else len({*domains}) == 1
        assert len(domains) == NUM_PARTS
        assert each["text"] == "\n\n".join(part["text"] for part in each["parts"])
        for part in each["parts"]:
            used[part["text"]] += 1
            assert part["text"] in splits[part["domain"]].passages["held out"]
            assert MIN_CHARS <= len(part["text"]) <= MAX_CHARS
    assert set(used.values()) == {1}
    for kind in ("mixed", "single"):
        seen = {part["domain"] for each in held_out if each["kind"] == kind for part in each["parts"]}
        assert seen == set(DOMAINS)
    assert len({each["kind"] for each in held_out[:20]}) == 2, "whoever takes only the first ones gets some of each"


def test_training_records_are_passages_to_complete(
    files: dict[str, list[Any]], splits: dict[str, Split], m: Any
) -> None:
    for domain, found in splits.items():
        for part in ("train", "val"):
            records = files[f"{part}_{domain}.jsonl"]
            assert [record["prompt"] + record["completion"] for record in records] == found.passages[part]
            assert {record["domain"] for record in records} == {domain}
            assert all(1 <= len(record["prompt"]) <= len(record["completion"]) + 1 for record in records)
            example = encode(records[0], m.tokenizer)
            assert {*example.domains} == {domain}
            assert 0 < example.response < len(example.token_ids) - 1
    router = files["train_router.jsonl"]
    own = {text for found in splits.values() for text in found.passages["router"]}
    for record in router[:200]:
        assert set(record) == {"prompt", "completion"}
        assert sum(text in record["prompt"] + record["completion"] for text in own) >= NUM_PARTS
    assert {*encode(router[0], m.tokenizer).domains} == {None}


def test_one_licence_is_kept_once() -> None:
    permission = "Permission is hereby granted free of charge to any person obtaining a copy of this software"
    again = permission.upper().replace(" ", "\n * ")
    ours = Source("a", (permission, "The MIT License"))
    theirs = Source("b", ("the mit license.", f"Dear friends, {again} and that is all", "Something of its own"))
    assert distinct(iter([ours, theirs])) == [ours, Source("b", ("Something of its own",))]


def test_what_one_block_ends_and_the_next_begins_with_is_kept_once() -> None:
    found = [f"{letter}{number:09}" for letter in "abc" for number in range(10)]
    ours = Source("a", (" ".join(found[:10]), " ".join(found[10:20])))
    theirs = Source("b", (" ".join([*found[20:], *found[3:17], *found[20:]]), " ".join(found[20:] * 40)))
    sources = [ours, theirs]
    assert distinct(iter(sources)) == sources
    (kept, texts), (other, others) = distinct_passages(sources, "\n")
    assert (kept, texts) == (ours, ["\n".join(ours.blocks)])
    assert (other, others) == (theirs, [theirs.blocks[1]])


def test_blocks_are_put_together_until_a_passage_is_full() -> None:
    blocks = ["a" * 100, "b" * 100, "c" * 200, "d" * 349, "e" * 100]
    assert passages(Source("s", tuple(blocks)), "\n") == ["a" * 100 + "\n" + "b" * 100, "c" * 200, "d" * 349]


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(order: str) -> None:
    data = catalogue(["Größe ändern".encode(), b"one\0many", b"x"], order=order)
    assert read_catalogue(data) == ["Größe ändern", "one", "x"]
    assert gettext.GNUTranslations(BytesIO(data)).gettext("message 0") == "Größe ändern"


def test_djangos_messages() -> None:
    pytest.importorskip("django")
    found = {source.name: source for source in messages()}
    blocks = found["django/contrib/auth/locale/de/LC_MESSAGES/django.mo"].blocks
    assert any("Passwort" in block for block in blocks)


def test_without_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_sources, "distributions", lambda: [])
    monkeypatch.setattr(texts, "DOMAINS", {name: DOMAINS[name] for name in ("messages", "legal")})
    for domain in ("messages", "legal"):
        with pytest.raises(ValueError, match=rf"of the domain '{domain}'.*pip install -e"):
            split(domain, 0)
    with pytest.raises(SystemExit) as end:
        main(["--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "too few texts of the domain 'messages'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", ["python", "prose"])
def test_a_python_without_sources_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, domain: str) -> None:
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="sources of Python's standard library must be installed"):
        split(domain, 0)
