"""autodet: give it your object detector and your COCO-format data; it hands back a better and faster one."""

__version__ = "0.1.0"
