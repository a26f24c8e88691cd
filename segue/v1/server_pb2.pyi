import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from segue.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATUS_UNSPECIFIED: _ClassVar[EngineStatus]
    ENGINE_STATUS_STARTING: _ClassVar[EngineStatus]
    ENGINE_STATUS_SERVING: _ClassVar[EngineStatus]
    ENGINE_STATUS_STOPPING: _ClassVar[EngineStatus]
ENGINE_STATUS_UNSPECIFIED: EngineStatus
ENGINE_STATUS_STARTING: EngineStatus
ENGINE_STATUS_SERVING: EngineStatus
ENGINE_STATUS_STOPPING: EngineStatus

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("model", "device", "dtype", "version", "layers", "vocab_size", "context_tokens", "page_tokens", "pages", "cpu_workers", "copy_bytes_per_second", "max_lora_rank")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    CPU_WORKERS_FIELD_NUMBER: _ClassVar[int]
    COPY_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    model: str
    device: str
    dtype: str
    version: str
    layers: int
    vocab_size: int
    context_tokens: int
    page_tokens: int
    pages: int
    cpu_workers: int
    copy_bytes_per_second: float
    max_lora_rank: int
    def __init__(self, model: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., version: _Optional[str] = ..., layers: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_tokens: _Optional[int] = ..., page_tokens: _Optional[int] = ..., pages: _Optional[int] = ..., cpu_workers: _Optional[int] = ..., copy_bytes_per_second: _Optional[float] = ..., max_lora_rank: _Optional[int] = ...) -> None: ...

class WatchStateRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchStateResponse(_message.Message):
    __slots__ = ("status", "queue", "pages", "residency", "cpu_workers", "steps", "profile")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    CPU_WORKERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    status: EngineStatus
    queue: Queue
    pages: Pages
    residency: Residency
    cpu_workers: CpuWorkers
    steps: int
    profile: CostProfile
    def __init__(self, status: _Optional[_Union[EngineStatus, str]] = ..., queue: _Optional[_Union[Queue, _Mapping]] = ..., pages: _Optional[_Union[Pages, _Mapping]] = ..., residency: _Optional[_Union[Residency, _Mapping]] = ..., cpu_workers: _Optional[_Union[CpuWorkers, _Mapping]] = ..., steps: _Optional[int] = ..., profile: _Optional[_Union[CostProfile, _Mapping]] = ...) -> None: ...

class Queue(_message.Message):
    __slots__ = ("waiting", "prefilling", "decoding")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PREFILLING_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    prefilling: int
    decoding: int
    def __init__(self, waiting: _Optional[int] = ..., prefilling: _Optional[int] = ..., decoding: _Optional[int] = ...) -> None: ...

class Pages(_message.Message):
    __slots__ = ("total", "free", "kv", "adapter")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    kv: int
    adapter: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., kv: _Optional[int] = ..., adapter: _Optional[int] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("adapters", "host_free_bytes")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOST_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterResidency]
    host_free_bytes: int
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterResidency, _Mapping]]] = ..., host_free_bytes: _Optional[int] = ...) -> None: ...

class AdapterResidency(_message.Message):
    __slots__ = ("name", "version", "tier", "users")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    tier: _generation_pb2.Tier
    users: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., tier: _Optional[_Union[_generation_pb2.Tier, str]] = ..., users: _Optional[int] = ...) -> None: ...

class CpuWorkers(_message.Message):
    __slots__ = ("ready", "restarts")
    READY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    ready: int
    restarts: int
    def __init__(self, ready: _Optional[int] = ..., restarts: _Optional[int] = ...) -> None: ...

class CostProfile(_message.Message):
    __slots__ = ("decode", "prefill", "copy", "cpu_delta")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    CPU_DELTA_FIELD_NUMBER: _ClassVar[int]
    decode: DecodeCost
    prefill: PrefillCost
    copy: CopyCost
    cpu_delta: CpuDeltaCost
    def __init__(self, decode: _Optional[_Union[DecodeCost, _Mapping]] = ..., prefill: _Optional[_Union[PrefillCost, _Mapping]] = ..., copy: _Optional[_Union[CopyCost, _Mapping]] = ..., cpu_delta: _Optional[_Union[CpuDeltaCost, _Mapping]] = ...) -> None: ...

class DecodeCost(_message.Message):
    __slots__ = ("base_seconds", "seconds_per_token", "seconds_per_context_token", "seconds_per_rank_byte", "seconds_per_adapter")
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_CONTEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_RANK_BYTE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    base_seconds: float
    seconds_per_token: float
    seconds_per_context_token: float
    seconds_per_rank_byte: float
    seconds_per_adapter: float
    def __init__(self, base_seconds: _Optional[float] = ..., seconds_per_token: _Optional[float] = ..., seconds_per_context_token: _Optional[float] = ..., seconds_per_rank_byte: _Optional[float] = ..., seconds_per_adapter: _Optional[float] = ...) -> None: ...

class PrefillCost(_message.Message):
    __slots__ = ("base_seconds", "seconds_per_token", "seconds_per_attended_token", "seconds_per_rank_byte")
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_ATTENDED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_RANK_BYTE_FIELD_NUMBER: _ClassVar[int]
    base_seconds: float
    seconds_per_token: float
    seconds_per_attended_token: float
    seconds_per_rank_byte: float
    def __init__(self, base_seconds: _Optional[float] = ..., seconds_per_token: _Optional[float] = ..., seconds_per_attended_token: _Optional[float] = ..., seconds_per_rank_byte: _Optional[float] = ...) -> None: ...

class CopyCost(_message.Message):
    __slots__ = ("base_seconds", "seconds_per_byte")
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    base_seconds: float
    seconds_per_byte: float
    def __init__(self, base_seconds: _Optional[float] = ..., seconds_per_byte: _Optional[float] = ...) -> None: ...

class CpuDeltaCost(_message.Message):
    __slots__ = ("base_seconds", "core_seconds_per_token_rank")
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CORE_SECONDS_PER_TOKEN_RANK_FIELD_NUMBER: _ClassVar[int]
    base_seconds: float
    core_seconds_per_token_rank: float
    def __init__(self, base_seconds: _Optional[float] = ..., core_seconds_per_token_rank: _Optional[float] = ...) -> None: ...
