"""What a policy, a plan, a budget, a calibration, a metric and healing are."""

from __future__ import annotations

from docs.drawings.svg import Drawing


def policy() -> Drawing:
    d = Drawing("The first rule that matches a weight decides what becomes of it", 200)
    d.text(90, 14, "rules, first match decides", "small bold")
    d.text(300, 14, "weights", "small bold")
    rules = (("*.mlp.*", "low rank", "blue"), ("*.attn.*", "Kronecker", "orange"), ("lm_head", "keep", "grey"))
    weights = (("h.0.mlp.up", 0), ("h.0.mlp.down", 0), ("h.0.attn.qkv", 1), ("lm_head", 2), ("embed", None))
    at = [44, 88, 132]
    for y, (match, kind, colour) in zip(at, rules, strict=True):
        d.box(10, y - 17, 160, 34, colour, f"{match}: {kind}")
    for number, (name, rule) in enumerate(weights):
        y = 38 + 32 * number
        d.box(246, y - 12, 104, 24, "none" if rule is None else rules[rule][2], name, small=True)
        if rule is not None:
            d.arrow(172, at[rule], 242, y)
    d.text(180, 188, "a weight that no rule matches stays as it is", "small")
    return d


def plan() -> Drawing:
    d = Drawing(
        "A plan is made from model, policy and calibration; it is looked at, then carried out whole or not at all", 200
    )
    for y, name in ((26, "model"), (66, "policy"), (106, "calibration")):
        d.box(8, y - 14, 88, 28, "grey", name)
        d.arrow(98, y, 128, 66)
    d.box(130, 40, 98, 52, "blue", "plan:\nchanges nothing", small=True)
    d.arrow(230, 66, 256, 66)
    d.box(258, 48, 92, 36, "orange", "compress")
    d.arrow(304, 86, 304, 124)
    d.box(258, 126, 92, 34, "green", "smaller\nmodel", small=True)
    d.arrow(178, 92, 178, 124)
    d.text(178, 140, "print, save,\nload, change", "small")
    d.text(180, 186, "an error or Ctrl-C leaves the model as it was", "small")
    return d


def budget() -> Drawing:
    d = Drawing(
        "The same budget shared equally, and shared by estimated loss: some layers then keep more than others", 220
    )
    for x, title, kept in (
        (14, "uniform", (0.6, 0.6, 0.6, 0.6, 0.6, 0.6)),
        (194, "by estimated loss", (1.0, 0.75, 0.45, 0.35, 0.4, 0.65)),
    ):
        d.text(x + 76, 14, title, "small bold")
        for layer, share in enumerate(kept):
            left = x + 26 * layer
            d.box(left, 30, 20, 120, "none")
            d.box(left, 30 + 120 * (1 - share), 20, 120 * share, "blue" if x < 100 else "orange")
        d.text(x + 76, 166, "layers 1 to 6", "small")
    d.text(180, 192, "filled: kept; both keep 60% of all parameters", "small")
    d.text(180, 210, "budget = params after / params before", "small")
    return d


def calibration() -> Drawing:
    d = Drawing(
        "Calibration runs batches through the model and measures inputs and output gradients of each weight", 190
    )
    d.box(8, 50, 74, 40, "grey", "batches")
    d.arrow(84, 70, 128, 70)
    d.text(106, 56, "x")
    d.box(130, 44, 92, 52, "blue", "y = W x")
    d.arrow(224, 62, 268, 62)
    d.text(246, 50, "y")
    d.arrow(268, 80, 224, 80)
    d.text(246, 94, "g")
    d.box(270, 50, 80, 40, "grey", "loss")
    d.arrow(106, 80, 106, 124)
    d.box(38, 126, 130, 32, "orange", "C = E[x xᵀ]")
    d.arrow(246, 104, 246, 124)
    d.box(190, 126, 130, 32, "orange", "S = E[g gᵀ]")
    d.text(180, 178, "second moments; the model is left unchanged", "small")
    return d


def metric() -> Drawing:
    d = Drawing(
        "Directions of equal length in the weight differ in what they cost: the metric weighs them by the data", 222
    )
    for x, title, wide, high in ((90, "Frobenius norm", 58, 58), (268, "calibrated metric", 80, 28)):
        d.text(x, 14, title, "small bold")
        d.path(f"M{x - wide} 95a{wide} {high} 0 1 0 {2 * wide} 0a{wide} {high} 0 1 0 {-2 * wide} 0", "blue")
        d.arrow(x, 95, x + 46, 95)
        d.arrow(x, 95, x, 49)
        d.text(x + 30, 110, "e₁", "small")
        d.text(x - 14, 60, "e₂", "small")
    d.text(90, 174, "errors e₁ and e₂\ncount the same", "small")
    d.text(268, 174, "e₁ lies inside: cheap\ne₂ reaches out: costly", "small")
    d.text(180, 210, "an outline joins errors that raise the loss equally", "small")
    return d


def healing() -> Drawing:
    d = Drawing("The compressed model is trained to predict what the dense model predicts on the same tokens", 190)
    d.box(8, 66, 70, 36, "grey", "tokens")
    d.arrow(80, 76, 122, 44)
    d.arrow(80, 92, 122, 124)
    d.box(124, 24, 110, 40, "grey", "dense model\n(fixed)")
    d.box(124, 106, 110, 40, "blue", "compressed\n(trained)")
    d.arrow(236, 44, 268, 76)
    d.arrow(236, 124, 268, 92)
    d.box(270, 62, 82, 44, "orange", "divergence\nof logits", small=True)
    d.path("M311 108V166H179")
    d.arrow(179, 166, 179, 148)
    d.text(246, 180, "gradients", "small")
    return d


def design() -> Drawing:
    d = Drawing(
        "Decompositions turn a weight into factors, hosts hold the weights of layers; both meet at the matrix", 210
    )
    d.text(62, 14, "decompositions", "small bold")
    d.text(298, 14, "hosts", "small bold")
    for number, (kind, host) in enumerate(
        (("low rank", "nn.Linear"), ("Kronecker", "nn.Conv2d"), ("Tucker", "nn.LSTM"), ("yours", "yours"))
    ):
        y = 30 + 40 * number
        own = number == 3
        d.box(8, y, 108, 30, "none" if own else "blue", kind)
        d.box(244, y, 108, 30, "none" if own else "orange", host)
        d.path(f"M118 {y + 15}L142 105")
        d.path(f"M242 {y + 15}L218 105")
    d.box(142, 80, 76, 50, "green", "weight\n(out, in)", small=True)
    d.text(180, 200, "N + M classes, no class for a pair", "small")
    return d


CONCEPTS = {f"concept-{made.__name__}": made() for made in (policy, plan, budget, calibration, metric, healing, design)}
