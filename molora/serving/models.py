"""`/v1/models`, and adapters that are loaded, replaced and unloaded while the server runs."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from molora.bank import check_name
from molora.serving.adapter_files import check_adapter
from molora.serving.errors import InvalidRequestError
from molora.serving.fields import Activation, Neutral, RequestPart, Text
from molora.serving.protocol import ErrorBody
from molora.serving.service import Model, Service, TheService

router = APIRouter(tags=["models"])


class AdapterCard(BaseModel):
    """The extension field `molora` of a model that is an adapter. The digest is of its contents, not of its name."""

    adapter: str
    digest: str
    routable: bool
    activation: str | int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["molora"] = "molora"
    root: str
    parent: str | None
    max_model_len: int
    molora: AdapterCard | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadRequest(RequestPart):
    """vLLM's body, and `activation`, the adapter's default policy."""

    neutral: ClassVar[Neutral] = {"is_3d_lora_weight": (False,), "base_model_name": ()}

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False
    activation: Activation | None = None


class UnloadRequest(RequestPart):
    neutral: ClassVar[Neutral] = {"lora_int_id": ()}

    lora_name: Text


class Unloaded(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


@router.get("/v1/models")
async def list_models(service: TheService) -> ModelList:
    return ModelList(data=[card(service, model) for model in service.models().values()])


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, service: TheService) -> ModelCard:
    return card(service, service.model(model_id))


@router.post("/v1/load_lora_adapter", responses={409: {"model": ErrorBody}})
async def load_adapter(body: LoadRequest, service: TheService) -> ModelCard:
    """Load an adapter, or replace one that is there (`load_inplace`). Running requests keep what they began with.

    The answer is 200 once the adapter can be used.
    """
    check_enabled(service, body.lora_name)
    if is_known(service, body.lora_name) and not body.load_inplace:
        raise InvalidRequestError(
            f"lora_name: there is an adapter {body.lora_name!r}; send load_inplace: true to replace it",
            param="lora_name",
        )

    def load() -> None:
        folder = check_adapter(body.lora_path, service.adapter_folders, service.limits)
        try:
            service.loader.load_adapter(body.lora_name, folder, activation=body.activation, replace=body.load_inplace)
        except (ValueError, FileNotFoundError) as error:
            raise InvalidRequestError(f"lora_path: {error}", param="lora_path") from error

    await asyncio.to_thread(load)
    return card(service, service.model(service.name_of(body.lora_name)))


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadRequest, service: TheService) -> Unloaded:
    """Take an adapter out. Running requests keep it until they end."""
    check_enabled(service, body.lora_name)
    if not is_known(service, body.lora_name):
        raise InvalidRequestError(f"there is no adapter {body.lora_name!r}", param="lora_name", status=404)
    try:
        await asyncio.to_thread(service.loader.unload_adapter, body.lora_name)
    except ValueError as error:
        raise InvalidRequestError(str(error), param="lora_name") from error
    return Unloaded(id=service.name_of(body.lora_name))


def card(service: Service, model: Model) -> ModelCard:
    info = model.adapter
    return ModelCard(
        id=model.name,
        created=service.created,
        root=model.root,
        parent=model.parent,
        max_model_len=service.engine.m.max_context,
        molora=None
        if info is None
        else AdapterCard(adapter=info.name, digest=info.digest, routable=info.routable, activation=info.activation),
    )


def check_enabled(service: Service, name: str) -> None:
    """
    Raises:
        InvalidRequestError: this server loads no adapters, or the name is none.
    """
    if not service.adapter_folders:
        raise InvalidRequestError(
            "this server loads no adapters; start it with --adapter-folder to allow it", status=403
        )
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidRequestError(f"lora_name: {error}", param="lora_name") from None


def is_known(service: Service, name: str) -> bool:
    return any(info.name == name for info in service.engine.adapters())
