"""Drawn landscapes: scenes, their captions, and images of them."""

from decinb.scenes.attributes import ATTRIBUTES, IMAGE_SIZE, Scene, differing, random_scene
from decinb.scenes.captions import caption, web_caption
from decinb.scenes.render import depth_map, house_mask, render, strokes, thing_mask

__all__ = [
    "ATTRIBUTES",
    "IMAGE_SIZE",
    "Scene",
    "caption",
    "depth_map",
    "differing",
    "house_mask",
    "random_scene",
    "render",
    "strokes",
    "thing_mask",
    "web_caption",
]
