"""What lies beside a checkpoint's weights, by name."""

from accessory.checkpoint.layouts import INDEX_NAMES
from accessory.checkpoint.layouts.peft import CONFIG_NAME as ADAPTER_CONFIG
from accessory.text.form_files import META_NAME, MORE_TEMPLATES, TEXT_NAMES

# Sizes and sums of what a conversion has written.
MANIFEST_NAME = "manifest.json"
CONFIG_FILES = ("config.json", "params.json")
# Of weights, in whatever form.
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".gguf")
# What is read. The folder MORE_TEMPLATES holds templates too.
COMPANIONS = frozenset({*CONFIG_FILES, ADAPTER_CONFIG, META_NAME, MANIFEST_NAME, *TEXT_NAMES})
# What belongs to a checkpoint's folder.
KNOWN = COMPANIONS | {*INDEX_NAMES, MORE_TEMPLATES, "split.py", "README.md", "converted", "checklist.chk"}
