"""The demos' pages."""

import os

# Before the first import of gradio: no program of ours tells others that it runs.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
