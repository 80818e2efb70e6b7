"""What peers say when one asks another for the model: ``model-sharing/0``. No I/O.

::

    requester  -> ConfigRequest | ParameterRequest(name)         postcard, then the end of the stream
    responder  <- Ok(BlobTicket) | Err(SharingError variant)     postcard, then the end of the stream

The ticket names a blob that holds a :class:`ModelConfig` or a :class:`ModelParameter`, as postcard of
``TransmittableDownload``. Sources: PsycheFoundation/psyche ``shared/network/src/p2p_model_sharing.rs``,
``shared/network/src/lib.rs``, ``shared/network/src/serialized_distro.rs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

from ....errors import NotSharedError, ProtocolError
from ... import postcard
from ...postcard import Err, Limit, Ok
from ...tickets import BlobTicket

__all__ = [
    "ALPN",
    "MAX_ANSWER",
    "MAX_CONFIG_BLOB",
    "MAX_REQUEST",
    "ConfigRequest",
    "ModelConfig",
    "ModelParameter",
    "ParameterRequest",
    "ParameterUnknown",
    "ParametersNotInitialized",
    "SerializationError",
    "TensorName",
    "decode_answer",
    "decode_blob",
    "decode_request",
    "encode_answer",
    "encode_blob",
    "encode_request",
]

ALPN: Final = b"model-sharing/0"
# What each side reads at most (`shared/network/src/p2p_model_sharing.rs`, `lib.rs`).
MAX_REQUEST: Final = 1000
MAX_ANSWER: Final = 16384

# Our own bounds. Names of parameters have a few dozen characters; the largest tokenizers have some 20 MB of JSON.
_MAX_NAME: Final = 1024
_MAX_NAMES: Final = 100_000
_MAX_CONFIG: Final = 4 << 20
_MAX_TOKENIZER: Final = 64 << 20
_MAX_ERROR_TEXT: Final = 8192
MAX_CONFIG_BLOB: Final = _MAX_CONFIG + _MAX_TOKENIZER + (16 << 20)

_Text = Annotated[str, Limit(_MAX_ERROR_TEXT)]
TensorName = Annotated[str, Limit(_MAX_NAME)]
"""Of a parameter."""


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigRequest:
    """Asks for the configuration, the tokenizer and the names of all parameters."""


@dataclass(frozen=True)
class ParameterRequest:
    """Asks for one parameter."""

    name: TensorName


ModelRequest = ConfigRequest | ParameterRequest


def encode_request(request: ConfigRequest | ParameterRequest) -> bytes:
    """See :func:`decode_request`."""
    return postcard.encode(request, ModelRequest)


def decode_request(data: bytes) -> ConfigRequest | ParameterRequest:
    """Raises ProtocolError. Bytes behind the request are ignored, as by Psyche's peers."""
    request: ConfigRequest | ParameterRequest = postcard.decode(ModelRequest, data, allow_trailing=True)
    return request


# -- answers: the variants of `SharableModelError`, in its order -------------------------------------------------------


@dataclass(frozen=True)
class TchSerializeError:
    """The peer cannot serialize a tensor."""

    text: _Text


@dataclass(frozen=True)
class InvalidUpdate:
    """An update does not have the parameters of the model."""


@dataclass(frozen=True)
class ParameterUnknown:
    """The peer has no parameter of the name that was asked for."""

    text: _Text


@dataclass(frozen=True)
class ParameterAlreadyAdded:
    """A parameter was given twice."""


@dataclass(frozen=True)
class SerializationError:
    """A tensor cannot be serialized."""

    text: _Text


@dataclass(frozen=True)
class ParametersNotInitialized:
    """The peer has no parameters to share yet."""


@dataclass(frozen=True)
class ParameterNotInitialized:
    """The peer has not got this parameter yet."""

    text: _Text


@dataclass(frozen=True)
class ResponseChannelNotInitialized:
    """The peer is not ready to hand on what it receives."""


@dataclass(frozen=True)
class ConnectionIOError:
    """The connection broke."""

    text: _Text


@dataclass(frozen=True)
class DecodeParameterNameError:
    """The name that was asked for is not UTF-8."""

    text: _Text


@dataclass(frozen=True)
class ModelConfigNotInitialized:
    """The peer has no configuration to share yet."""


@dataclass(frozen=True)
class TokenizerConfigNotInitialized:
    """The peer has no tokenizer to share yet."""


@dataclass(frozen=True)
class ParseConfig:
    """A configuration cannot be read."""

    text: _Text


@dataclass(frozen=True)
class SendConfig:
    """The configuration cannot be handed on within the peer."""


@dataclass(frozen=True)
class LoadThreadCrashed:
    """The peer failed while it loaded the model."""


@dataclass(frozen=True)
class P2PAddDownloadError:
    """The peer cannot make a blob of what was asked for."""

    text: _Text


SharableModelError = (
    TchSerializeError
    | InvalidUpdate
    | ParameterUnknown
    | ParameterAlreadyAdded
    | SerializationError
    | ParametersNotInitialized
    | ParameterNotInitialized
    | ResponseChannelNotInitialized
    | ConnectionIOError
    | DecodeParameterNameError
    | ModelConfigNotInitialized
    | TokenizerConfigNotInitialized
    | ParseConfig
    | SendConfig
    | LoadThreadCrashed
    | P2PAddDownloadError
)
_Answer = Ok[BlobTicket] | Err[SharableModelError]


def encode_answer(answer: BlobTicket | Any) -> bytes:
    """The bytes of a ticket, or of one of the variants of ``SharableModelError``."""
    return postcard.encode(Ok(answer) if isinstance(answer, BlobTicket) else Err(answer), _Answer)


def decode_answer(data: bytes) -> BlobTicket:
    """The ticket.

    Raises:
        NotSharedError: the peer answered with an error; ``reason`` is its variant.
        ProtocolError: malformed.
    """
    answer: Ok[BlobTicket] | Err[Any] = postcard.decode(_Answer, data, allow_trailing=True)
    if isinstance(answer, Ok):
        return answer.value
    reason = type(answer.error).__name__
    # Words of a stranger, for a log: bounded, and without line ends.
    text = repr(getattr(answer.error, "text", ""))[:200]
    raise NotSharedError(f"the peer does not share this: {reason} {text}", reason=reason)


# -- blobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DistroResult:
    """Variant 0 is a training result, which does not belong here; its content is not read."""


@dataclass(frozen=True)
class ModelParameter:
    """One parameter.

    Attributes:
        name: UTF-8.
        value: the tensor's archive, see :mod:`~distro_optim.comm.iroh.sharing.torchscript`.
    """

    name: Annotated[bytes, Limit(_MAX_NAME)]
    value: bytes


@dataclass(frozen=True)
class ModelConfig:
    """All that is not a parameter.

    Attributes:
        config: text of the model's ``config.json``.
        tokenizer: JSON of the Hugging Face tokenizer.
        parameter_names: of all parameters, in any order.
    """

    config: Annotated[str, Limit(_MAX_CONFIG)]
    tokenizer: Annotated[str, Limit(_MAX_TOKENIZER)]
    parameter_names: Annotated[list[TensorName], Limit(_MAX_NAMES)]


_TransmittableDownload = _DistroResult | ModelParameter | ModelConfig


def encode_blob(content: ModelParameter | ModelConfig) -> bytes:
    """What a ticket of model sharing leads to."""
    return postcard.encode(content, _TransmittableDownload)


def decode_blob(data: bytes | memoryview) -> ModelParameter | ModelConfig:
    """See :func:`encode_blob`; raises ProtocolError."""
    content: _DistroResult | ModelParameter | ModelConfig = postcard.decode(_TransmittableDownload, data)
    if isinstance(content, _DistroResult):
        raise ProtocolError("a training result came in place of a part of the model")
    return content
