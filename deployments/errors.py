"""The tree of errors that Triptych raises; serve_app.http.errors maps each kind to an HTTP status.

TriptychError
├── InvalidRequestError       the caller's fault: a parameter that the model or a limit does not allow   (400)
│   ├── DeadlineExceededError  what was asked was not done by its deadline                                (400)
│   ├── AdapterReplacedError  the file of a LoRA is another one than the request was accepted with        (400)
│   └── TooLargeForDeviceError  the request alone needs more memory than the device has                   (400)
├── NotSupportedError         the model cannot do what was asked                                          (400)
├── ModelNotFoundError        no such model is served                                                     (404)
├── StageUnavailableError     a stage has no replica that can answer now                                  (503)
├── DeviceFullError           the device has no memory free for the request now                           (503)
├── GenerationFailedError     the stages failed although the request was fine                             (500)
│   └── PipelineFailedError   the pipeline's own code failed on the request: whose fault it is, the application tells
│       └── NotNumbersError   it made NaN or infinite values
├── StorageError              the output could not be stored                                              (502)
├── CannotResumeError         the saved steps of a request are of no use here: it starts again            (never)
├── ReplicaUnfitError         the replica cannot work any more: another one does the request's work        (never)
├── ReplicaRefusedError       the replica has not begun with the request: it is asked again later          (never)
├── OtherVersionError         the replica is of another version of the model: the request is made again    (never)
├── PassesApartError          the guidance passes of a request cannot wait for each other: it starts again    (never)
├── CheckpointError           a checkpoint folder cannot be served; raised while a replica starts
└── HandOffError              the pipeline did not behave as the hand-off between stages needs: remote calls may help
    ├── FeedsBackError        decoded or encoded data is needed inside the loop: remote calls serve it
    └── HandOffIncompleteError  a decoder call was not handed over: ask for the complete hand-off

Every class must stay picklable with its text alone: errors travel from replica to replica.
"""

from __future__ import annotations


class TriptychError(Exception):
    """The root of all errors raised on purpose."""


class InvalidRequestError(TriptychError):
    """The caller sent a value that cannot be used; `param` names the field of the request's body."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class NotSupportedError(InvalidRequestError):
    """The served model cannot do what was asked."""

    def __init__(self, message: str, param: str | None = None, code: str = "not_supported") -> None:
        super().__init__(message, param, code)


class DeadlineExceededError(InvalidRequestError):
    """The deadline that the caller set has passed before the work was done."""

    def __init__(self, message: str, param: str | None = "deadline_s", code: str = "deadline_exceeded") -> None:
        super().__init__(message, param, code)


class AdapterReplacedError(InvalidRequestError):
    """The file of a LoRA has another digest than the request says: the application asks again without one."""

    def __init__(self, message: str, param: str | None = "loras", code: str = "lora_replaced") -> None:
        super().__init__(message, param, code)


class TooLargeForDeviceError(InvalidRequestError):
    """The request alone needs more memory than the device of a stage has beside the weights."""

    def __init__(self, message: str, param: str | None = "size", code: str = "too_large_for_device") -> None:
        super().__init__(message, param, code)


class ModelNotFoundError(InvalidRequestError):
    """The named model is not served here."""

    def __init__(self, message: str, param: str | None = "model", code: str = "model_not_found") -> None:
        super().__init__(message, param, code)


class StageUnavailableError(TriptychError):
    """A stage has no replica that can answer now; trying again later may help."""


class DeviceFullError(TriptychError):
    """The memory of a stage's device is full of other work; trying again later may help."""


class GenerationFailedError(TriptychError):
    """The stages failed although nothing is known to be wrong with the request."""


class PipelineFailedError(GenerationFailedError):
    """The pipeline's own code raised on this request, made no step of it, or made values that are not numbers.

    The text may be shown to callers. The request is at fault where one with default arguments works.
    """


class NotNumbersError(PipelineFailedError):
    """The model made values that are not numbers (NaN or infinite)."""

    def __init__(self, message: str = "the model made values that are not numbers (NaN or infinite)") -> None:
        super().__init__(message)


class StorageError(TriptychError):
    """The output was made but could not be stored."""


class CannotResumeError(TriptychError):
    """The saved steps of a request are damaged, or not of this model, version or request: it starts again."""


class ReplicaUnfitError(TriptychError):
    """The replica that worked on the request cannot go on: its device, its media workers or its engine are gone."""


class ReplicaRefusedError(TriptychError):
    """The replica has not begun with the request: it cannot work, or it tries a suspected request."""


class OtherVersionError(TriptychError):
    """What a request brings was made by a replica of another version of the model, as there are during an update."""


class PassesApartError(TriptychError):
    """The guidance passes of a request cannot wait for each other: it starts again, and makes them apart."""


class CheckpointError(TriptychError):
    """A checkpoint folder cannot be loaded or served; the sentence says why."""


class HandOffError(TriptychError):
    """A pipeline did not behave as the hand-off between stages needs."""


class FeedsBackError(HandOffError):
    """The loop needs what another stage makes; remote calls can serve such a pipeline."""


class HandOffIncompleteError(HandOffError):
    """A decoder call beyond the first was needed; the complete hand-off contains it."""
