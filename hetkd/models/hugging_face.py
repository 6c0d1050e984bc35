"""Class names and image-processor settings from Hugging Face configurations."""

import warnings
from contextlib import suppress
from typing import Any


def copy_label_names(teacher: Any, student: Any) -> None:
    """Give a Hugging Face student the names of its Hugging Face teacher's classes."""
    names = getattr(getattr(teacher, "config", None), "id2label", None)
    if names and len(names) == len(getattr(getattr(student, "config", None), "id2label", ())):
        student.config.id2label = dict(names)
        student.config.label2id = {name: index for index, name in names.items()}


def image_processor_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a Hugging Face model's image processor, from its files or its type's defaults."""
    from transformers import CONFIG_MAPPING, AutoImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if getattr(config, "_name_or_path", ""):
        with suppress(OSError, ValueError):  # the model may have come without an image processor
            processor = AutoImageProcessor.from_pretrained(
                config._name_or_path, local_files_only=True, trust_remote_code=False
            )
            return dict(processor.to_dict())
        warnings.warn(
            f"{config._name_or_path} has no image processor at hand: its type's default normalisation is used. If it "
            "is another one, set model.input_settings = {'mean': ..., 'std': ..., 'size': ...}.",
            RuntimeWarning,
            stacklevel=2,
        )
    whole = str(config.model_type).removesuffix("_vision_model")  # of CLIP's part for images it is CLIP
    config_class = CONFIG_MAPPING[whole] if whole in CONFIG_MAPPING else type(config)
    if config_class not in IMAGE_PROCESSOR_MAPPING:
        return {}
    entry = IMAGE_PROCESSOR_MAPPING[config_class]
    classes = entry.values() if isinstance(entry, dict) else entry
    processor_class = next(candidate for candidate in classes if candidate is not None)
    return dict(processor_class().to_dict())
