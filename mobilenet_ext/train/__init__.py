"""Training: the recipe behind ``mobilenet-ext train``, and its pieces for other loops and notebooks.

In a loop of one's own::

    from torch.utils.data import DataLoader
    from torchvision.transforms import v2
    from mobilenet_ext.train import InMemoryImagenette, RandomResize, StepGraph, choose_device, train_one_epoch

    augment = v2.Compose([RandomResize((256, 296, 384)), v2.RandomCrop(224), v2.ToDtype(torch.float32, scale=True)])
    loader = DataLoader(InMemoryImagenette("data", "train", transform=augment), batch_size=128, shuffle=True)
    step_graph = StepGraph()  # on a GPU: replays training steps from CUDA graphs; one for all epochs
    stats = train_one_epoch(model, loader, optimizer, device=choose_device(), step_graph=step_graph)
    print(stats.loss, stats.accuracy, stats.seconds)

The whole recipe, as the command line runs it::

    from mobilenet_ext.train import RunOptions, default_recipe, run_training

    result = run_training(default_recipe("digits", epochs=5), "runs/notebook", RunOptions())
"""

from mobilenet_ext.train.data import Digits, ImageFolder, InMemoryImagenette
from mobilenet_ext.train.decoding import UnreadableImage
from mobilenet_ext.train.errors import RecipeError, TrainError
from mobilenet_ext.train.inference import Classifier, evaluate_checkpoint, load_model
from mobilenet_ext.train.loader import ImageLoader
from mobilenet_ext.train.loop import (
    EpochStats,
    RunningStats,
    choose_device,
    count_trainable_parameters,
    evaluate,
    train_one_epoch,
)
from mobilenet_ext.train.recipe import Recipe, default_recipe
from mobilenet_ext.train.run import RunOptions, RunResult, run_training
from mobilenet_ext.train.step_graph import StepGraph
from mobilenet_ext.train.sweep import SweepRow, run_sweep
from mobilenet_ext.train.transforms import EvalTransform, Normalise, RandomResize, TrainTransform

__all__ = [
    "Classifier",
    "Digits",
    "EpochStats",
    "EvalTransform",
    "ImageFolder",
    "ImageLoader",
    "InMemoryImagenette",
    "Normalise",
    "RandomResize",
    "Recipe",
    "RecipeError",
    "RunOptions",
    "RunResult",
    "RunningStats",
    "StepGraph",
    "SweepRow",
    "TrainError",
    "TrainTransform",
    "UnreadableImage",
    "choose_device",
    "count_trainable_parameters",
    "default_recipe",
    "evaluate",
    "evaluate_checkpoint",
    "load_model",
    "run_sweep",
    "run_training",
    "train_one_epoch",
]
