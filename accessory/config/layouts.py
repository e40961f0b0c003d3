"""The names of the forms in which checkpoints are written; what they are stands in checkpoint/layouts."""

# As `accessory convert --to` has them, the first unless told otherwise; and those in which a run writes its models.
LAYOUT_NAMES = ("accessory", "accessory-sparse", "mistral", "hf", "gguf")
EXPORT_FORMS = ("accessory", "mistral", "hf")
# Of GGUF, as --type has them.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4")
