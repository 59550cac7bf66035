"""The models on offer, and adapters that are loaded and unloaded while the server runs."""

import json
import shutil

import pytest

from molora.adapter import Adapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def names(call, app):
    return [card["id"] for card in call(app, "GET", "/v1/models").json()["data"]]


def test_models_are_the_router_the_base_and_each_adapter(app, call):
    body = call(app, "GET", "/v1/models").json()
    assert body["object"] == "list"
    router, base, maths, _ = body["data"]
    assert names(call, app) == ["demo", "org/base", "demo:maths", "demo:code"]
    assert (router["root"], router["parent"]) == ("demo", "org/base")
    assert (base["root"], base["parent"]) == ("org/base", None)
    created = maths.pop("created")
    assert isinstance(created, int)
    assert maths == {
        "id": "demo:maths",
        "object": "model",
        "owned_by": "molora",
        "root": "adapters/maths",
        "parent": "org/base",
        "max_model_len": 1000,
        "molora": {"adapter": "maths", "digest": "digest of maths", "routable": False, "activation": "turn"},
    }


def test_one_model(app, call, assert_refused):
    for name in names(call, app):
        assert call(app, "GET", f"/v1/models/{name}").json()["id"] == name
    assert_refused(call(app, "GET", "/v1/models/nobody"), "model", words="unknown model 'nobody'", status=404)


def test_a_bank_without_a_router_offers_no_routed_model(engine, make_app, call):
    engine.m.bank = type(engine.m.bank)(has_router=False)
    assert names(call, make_app()) == ["org/base", "demo:maths", "demo:code"]


def test_two_models_of_one_name_are_an_error(engine, make_app):
    engine.m.bank = type(engine.m.bank)(name="org/base")
    with pytest.raises(ValueError, match="rename the bank"):
        make_app()


@pytest.fixture
def folder(tmp_path, make_adapter):
    make_adapter(seed=1).write(tmp_path / "loadable" / "law")
    return tmp_path / "loadable"


@pytest.fixture
def open_app(make_app, folder):
    return make_app(adapter_folders=(str(folder),))


@pytest.mark.parametrize(
    ("path", "body"), [(LOAD, {"lora_name": "law", "lora_path": "law"}), (UNLOAD, {"lora_name": "maths"})]
)
def test_it_is_off_unless_folders_are_named(app, call, assert_refused, path, body):
    assert_refused(call(app, "POST", path, json=body), None, words="--adapter-folder", status=403)


@pytest.mark.parametrize("absolute", [False, True])
def test_load_and_unload(open_app, call, folder, engine, absolute):
    path = str(folder / "law") if absolute else "law"
    response = call(open_app, "POST", LOAD, json={"lora_name": "law", "lora_path": path, "load_inplace": False})
    assert response.status_code == 200
    assert response.json()["id"] == "demo:law"
    assert response.json()["root"] == str(folder.resolve() / "law")
    assert "demo:law" in names(call, open_app)
    chat = {"model": "demo:law", "messages": [{"role": "user", "content": "x"}]}
    assert call(open_app, "POST", "/v1/chat/completions", json=chat).status_code == 200
    assert engine.requests[-1].route == "law"

    response = call(open_app, "POST", UNLOAD, json={"lora_name": "law", "lora_int_id": None})
    assert response.json() == {"id": "demo:law", "object": "model", "deleted": True}
    assert "demo:law" not in names(call, open_app)
    assert call(open_app, "POST", "/v1/chat/completions", json=chat).status_code == 404


def test_replacing_must_be_asked_for(open_app, call, assert_refused):
    body = {"lora_name": "code", "lora_path": "law"}
    assert_refused(call(open_app, "POST", LOAD, json=body), "lora_name", words="load_inplace")
    response = call(open_app, "POST", LOAD, json=body | {"load_inplace": True, "activation": "response"})
    assert (response.status_code, response.json()["molora"]["activation"]) == (200, "response")


def test_no_free_slot(open_app, call, engine, assert_refused):
    engine.num_free_slots = 0
    response = call(open_app, "POST", LOAD, json={"lora_name": "law", "lora_path": "law"})
    assert_refused(response, None, words="slots are in use", status=409)
    assert "demo:law" not in names(call, open_app)


@pytest.mark.parametrize("name", ["base", "auto", "../x", "a/b", "", ".x", "x" * 65, "a b", "\x00"])
def test_names_that_are_refused(open_app, call, assert_refused, name):
    for path, body in ((LOAD, {"lora_path": "law"}), (UNLOAD, {})):
        response = call(open_app, "POST", path, json={"lora_name": name, **body})
        assert_refused(response, "lora_name", words="no legal name")


def test_unloading_what_cannot_be(open_app, call, assert_refused):
    assert_refused(call(open_app, "POST", UNLOAD, json={"lora_name": "x"}), "lora_name", words="no adapter", status=404)
    assert_refused(call(open_app, "POST", UNLOAD, json={"lora_name": "maths"}), "lora_name", words="column")
    assert "demo:maths" in names(call, open_app)


def test_bad_paths_and_files_change_nothing(open_app, call, folder, assert_refused, monkeypatch):
    monkeypatch.setattr(Adapter, "read", lambda folder: pytest.fail("it was read"))
    before = names(call, open_app)
    shutil.copytree(folder / "law", folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(folder / "pickled" / "adapter_model.bin")
    for path, status in (("../law", 400), ("/etc", 403), ("nowhere", 404), ("pickled", 404), ("https://x/y", 404)):
        response = call(open_app, "POST", LOAD, json={"lora_name": "law", "lora_path": path})
        assert_refused(response, "lora_path", words="lora_path", status=status)
    assert names(call, open_app) == before


@pytest.mark.parametrize(
    "fields", [{"lora_path": "\ud800"}, {"lora_path": 3}, {"url": "https://x"}, {"activation": "x"}]
)
def test_a_refusal_names_the_field(open_app, call, assert_refused, fields):
    content = json.dumps({"lora_name": "law", "lora_path": "law"} | fields)
    response = call(open_app, "POST", LOAD, content=content, headers={"content-type": "application/json"})
    assert_refused(response, next(iter(fields)), words=next(iter(fields)))
