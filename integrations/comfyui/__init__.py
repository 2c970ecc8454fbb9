"""ComfyUI nodes of a FreeSpec service: put this folder, under any name, into ComfyUI's custom_nodes."""

from .node import FreeSpecVideo

NODE_CLASS_MAPPINGS = {"FreeSpecVideo": FreeSpecVideo}
NODE_DISPLAY_NAME_MAPPINGS = {"FreeSpecVideo": "FreeSpec video"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
