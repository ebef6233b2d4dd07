"""The one family of errors that this package raises for bad input.

Each error is a `ValueError`, so code that catches what diffusers raises catches ours too; `ObjectComposeError` catches
exactly ours. A message names the argument in backticks, the rule, and the value received.
"""


class ObjectComposeError(ValueError):
    """Base class of every error that the package raises for input it cannot use."""


class LayoutError(ObjectComposeError):
    """A layout, or one object of it, breaks its schema: broken JSON, a box outside [0, 1], an unknown field."""


class PhraseNotFoundError(ObjectComposeError):
    """A phrase does not occur in the prompt."""


class PromptTooLongError(ObjectComposeError):
    """A prompt, or the place of a phrase in it, lies beyond what the text encoder reads."""


class RegionError(ObjectComposeError):
    """A mask or region has the wrong shape, is empty, or does not fit on the finest grid."""


class LayerNotFoundError(ObjectComposeError):
    """A layer name or pattern matches no attention layer of the model."""


class PartConflictError(ObjectComposeError):
    """Two attention parts, or a part and a processor that is already installed, cannot work together."""


class MissingFieldError(ObjectComposeError):
    """A method needs a field of `SceneObject` that the object does not have."""


class CheckpointError(ObjectComposeError):
    """Weights are missing, corrupt, in an unsafe format, or made for another base model."""


class CheckpointFileError(CheckpointError, OSError):
    """Files of a checkpoint could not be read, written, fetched or pushed; also an `OSError`, as in diffusers."""


class ImageInputError(ObjectComposeError):
    """A picture cannot be read or has an unusable shape."""


class NonFiniteError(ObjectComposeError):
    """A tensor holds NaN or infinite values where finite ones are required."""


class ObjectNotFoundError(ObjectComposeError):
    """A phrase names nothing that is seen in the picture."""


class MissingPackageError(ObjectComposeError):
    """An optional package is needed that is not installed; the message holds the line that installs it."""
