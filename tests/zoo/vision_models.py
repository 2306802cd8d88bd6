"""Models of torchvision and timm, as lines of the zoo; the tables import the libraries, which lie in a side folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tdkit import Kronecker
from tests.zoo.architecture import Architecture, Inputs


def pixels(size: int = 32) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, 3, size, size),)


def torchvision_models() -> list[Architecture]:
    from torchvision import models
    from torchvision.models import convnext, efficientnet, regnet, vgg

    def small_vgg() -> nn.Module:
        """Its class builds layers of 4096 features, which smaller ones replace."""
        features = vgg.make_layers([16, "M", 32, "M"], batch_norm=True)
        with torch.device("meta"):
            model = vgg.VGG(features, init_weights=False)
        for index, sizes in {0: (32 * 49, 32), 3: (32, 32), 6: (32, 10)}.items():
            model.classifier[index] = nn.Linear(*sizes)
        return model

    def small_resnet() -> nn.Module:
        """The first two stages."""
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
        return model

    blocks = [efficientnet.MBConvConfig(*sizes, 1, 1.0, 1.0) for sizes in ((1, 3, 2, 16, 16), (4, 5, 2, 16, 24))]
    stages = [convnext.CNBlockConfig(*sizes, 1) for sizes in ((16, 32), (32, 48), (48, None))]
    regions = regnet.BlockParams.from_init_params(depth=4, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return [
        Architecture("VGG", small_vgg, pixels()),
        Architecture("ResNet", small_resnet, pixels()),
        Architecture("SqueezeNet", lambda: models.squeezenet1_1(num_classes=10), pixels(64)),
        Architecture("DenseNet", lambda: models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10), pixels(64)),
        Architecture("ShuffleNet V2", lambda: models.shufflenet_v2_x0_5(num_classes=10), pixels()),
        Architecture("MobileNetV2", lambda: models.mobilenet_v2(num_classes=10, width_mult=0.25), pixels()),
        Architecture("MobileNetV3", lambda: models.mobilenet_v3_small(num_classes=10, width_mult=0.25), pixels()),
        Architecture("EfficientNet", lambda: efficientnet.EfficientNet(blocks, 0.2, num_classes=10), pixels()),
        Architecture("RegNet", lambda: regnet.RegNet(regions, num_classes=10), pixels()),
        Architecture("ConvNeXt", lambda: models.ConvNeXt(stages, num_classes=10), pixels()),
        Architecture("ViT", lambda: models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10), pixels()),
        Architecture("Swin", lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]), pixels()),
        Architecture("MaxViT", lambda: models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0), pixels(64)),
    ]


def timm_models() -> list[Architecture]:
    import timm
    from timm import models
    from timm.layers import GatedMlp
    from timm.models._efficientnet_builder import decode_arch_def

    def made(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, num_classes=10, **options)

    def small_efficientnet() -> nn.Module:
        blocks = decode_arch_def([["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r1_k5_s2_e4_c24_se0.25"]])
        model: nn.Module = models.EfficientNet(blocks, num_classes=10, num_features=64)
        return model

    patches = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    widths = {"dims": (16, 24, 32, 40), "depths": (1, 1, 1, 1)}
    resnet, mixer = models.resnet, models.mlp_mixer
    residuals = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "cardinality": 4, "base_width": 16}
    return [
        Architecture("ResNet", made("resnet18", channels=(8, 16, 24, 32)), pixels()),
        Architecture("ResNeXt", lambda: models.ResNet(resnet.Bottleneck, num_classes=10, **residuals), pixels()),
        Architecture("VGG", lambda: models.VGG([16, "M", 32, "M"], num_classes=10, mlp_ratio=0.01), pixels(64)),
        Architecture("MobileNetV3", made("mobilenetv3_small_050"), pixels()),
        Architecture("EfficientNet", small_efficientnet, pixels()),
        Architecture("ConvNeXt", made("convnext_atto", **widths), pixels()),
        Architecture("DeiT", made("deit_tiny_distilled_patch16_224", **patches), pixels()),
        Architecture("DeiT, Kronecker", made("deit_tiny_patch16_224", **patches), pixels(), kind=Kronecker()),
        Architecture("BEiT", made("beit_base_patch16_224", **patches), pixels()),
        Architecture("EVA-02", made("eva02_tiny_patch14_224", **patches), pixels()),
        Architecture("XCiT", made("xcit_nano_12_p16_224", **patches), pixels()),
        Architecture("Mixer", lambda: models.MlpMixer(10, 32, patch_size=8, embed_dim=48, num_blocks=2), pixels()),
        Architecture("gMLP", lambda: models.MlpMixer(10, 32, patch_size=8, embed_dim=48, num_blocks=2, mlp_ratio=4,
                     mlp_layer=GatedMlp, block_layer=mixer.SpatialGatingBlock), pixels()),
        Architecture("MaxViT", made("maxvit_pico_rw_256", img_size=64, embed_dim=(32, 32), depths=(1, 1)), pixels(64)),
    ]  # fmt: skip
