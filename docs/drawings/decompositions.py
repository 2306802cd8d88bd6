"""The factors of each decomposition."""

from __future__ import annotations

from docs.drawings.svg import Drawing


def low_rank() -> Drawing:
    d = Drawing(
        "A matrix of out rows and in columns is the product of a left factor with r columns and a right one", 150
    )
    d.box(30, 20, 110, 90, "grey", "W", below={125: "in"})
    d.text(16, 65, "out", "small")
    d.text(156, 65, "≈")
    d.box(200, 20, 26, 90, "blue", "L", below={125: "r"})
    d.box(240, 20, 110, 26, "orange", "R", below={60: "in"})
    d.text(196, 65, "out", "small right")
    return d


def kronecker() -> Drawing:
    d = Drawing(
        "Every entry of A stands for a copy of B that is multiplied by it; several such products are added", 190
    )
    d.grid(14, 20, 60, 60, 3, 3, "blue")
    d.text(44, 50, "A", "bold")
    d.text(88, 50, "⊗")
    d.grid(104, 36, 40, 28, 2, 2, "orange", below={78: "B"})
    d.text(160, 50, "=")
    for row in range(3):
        for column in range(3):
            x, y = 180 + 56 * column, 14 + 27 * row
            d.box(x, y, 54, 25, "orange", f"a{'₁₂₃'[row]}{'₁₂₃'[column]} B", small=True)
    d.text(180, 128, "a sum of R such products:", "small")
    d.text(180, 158, "W ≈ A₁ ⊗ B₁ + A₂ ⊗ B₂ + …")
    return d


def permuted_kronecker() -> Drawing:
    d = Drawing("Rows and columns are put into another order, in which a Kronecker sum is nearer to the matrix", 170)
    mixed, ordered = [2, 0, 3, 1], [0, 1, 2, 3]
    for x, order in ((14, mixed), (230, ordered)):
        for row, own in enumerate(order):
            for column, other in enumerate(order):
                colour = "blue" if (own < 2) == (other < 2) else "orange"
                d.box(x + 28 * column, 20 + 24 * row, 27, 23, colour, "ab"[colour == "orange"], small=True)
    d.text(70, 132, "W, in its own order", "small")
    d.arrow(135, 68, 220, 68)
    d.text(177, 50, "reorder rows\nand columns", "small")
    d.text(177, 88, "p, q", "small")
    d.text(286, 132, "a Kronecker\nsum fits", "small")
    d.text(180, 160, "stored besides the factors: two integer vectors p and q", "small")
    return d


def tt_matrix() -> Drawing:
    d = Drawing(
        "A train of three cores: each carries one mode of the rows and one of the columns, bonds join them", 160
    )
    for number, (x, colour) in enumerate(((30, "blue"), (150, "orange"), (270, "green"))):
        d.box(x, 58, 62, 40, colour, f"G{'₁₂₃'[number]}")
        d.path(f"M{x + 31} 58V34")
        d.path(f"M{x + 31} 98V122")
        d.text(x + 31, 22, f"m{'₁₂₃'[number]}")
        d.text(x + 31, 136, f"n{'₁₂₃'[number]}")
    for x, name in ((92, "r₁"), (212, "r₂")):
        d.path(f"M{x} 78H{x + 58}")
        d.text(x + 29, 66, name)
    d.text(4, 22, "out", "small left")
    d.text(8, 136, "in", "small left")
    return d


def tucker() -> Drawing:
    d = Drawing("A convolution is written as a 1 x 1, a k x k on fewer channels, and a 1 x 1", 190)
    d.box(8, 30, 66, 66, "grey", "W\nk × k", below={112: "in → out"})
    d.text(90, 63, "≈")
    d.box(106, 42, 66, 42, "blue", "V\n1 × 1", below={112: "in → r_in"})
    d.arrow(174, 63, 192, 63)
    d.box(194, 34, 66, 58, "orange", "core\nk × k", below={112: "r_in → r_out"})
    d.arrow(262, 63, 280, 63)
    d.box(282, 42, 66, 42, "blue", "U\n1 × 1", below={112: "r_out → out"})
    d.text(180, 156, "W[o, i, :, :] ≈ Σ U[o, a] core[a, b, :, :] V[i, b]", "small")
    return d


def cp() -> Drawing:
    d = Drawing("A weight is a sum of products of vectors, one vector for each of its modes", 190)
    d.box(10, 24, 66, 60, "grey", "W")
    d.text(94, 54, "≈ Σ")
    for x, y, width, height, colour, name in (
        (126, 24, 16, 60, "blue", "out"),
        (156, 46, 60, 16, "orange", "in"),
        (230, 38, 16, 32, "green", "kh"),
        (262, 46, 32, 16, "red", "kw"),
    ):
        d.box(x, y, width, height, colour, below={100: name})
    for x in (149, 223, 254):
        d.text(x, 54, "∘")
    d.text(180, 136, "as convolutions, each channel by itself in the middle:", "small")
    d.text(180, 164, "1 × 1  →  kh × 1  →  1 × kw  →  1 × 1")
    return d


def spatial_low_rank() -> Drawing:
    d = Drawing("A k x k convolution is a k x 1 to r channels and a 1 x k after it", 150)
    d.grid(14, 24, 72, 72, 3, 3, "grey", below={114: "in → out"})
    d.text(108, 60, "≈")
    d.grid(140, 24, 24, 72, 3, 1, "blue", below={114: "in → r", 136: "k × 1"})
    d.arrow(176, 60, 220, 60)
    d.grid(234, 48, 72, 24, 1, 3, "orange", below={114: "r → out", 136: "1 × k"})
    return d


def stacked() -> Drawing:
    d = Drawing("Each expert has factors of its own, or all experts share one of the two", 200)
    d.text(90, 14, "own factors", "small bold")
    d.text(272, 14, "one factor shared", "small bold")
    for number in range(3):
        y = 28 + 50 * number
        d.box(30, y, 16, 40, "blue", "L")
        d.box(56, y + 12, 90, 16, "orange", "R")
        d.text(14, y + 20, f"{number + 1}", "small")
        d.box(210, y, 16, 40, "blue", "L")
        d.text(196, y + 20, f"{number + 1}", "small")
        d.path(f"M228 {y + 20}L246 98")
    d.box(248, 90, 96, 16, "orange", "R")
    d.text(90, 190, "E r (out + in)", "small")
    d.text(272, 190, "r (E out + in)", "small")
    return d


def shrink() -> Drawing:
    d = Drawing(
        "Hidden units that matter least are removed from all weights that share them; what is left is refitted", 190
    )
    for x, title, gone in ((14, "before", False), (196, "after", True)):
        d.text(x + 73, 14, title, "small bold")
        for unit in range(6):
            lost = gone and unit in (1, 4)
            y = 30 + 20 * unit
            d.box(x, y, 50, 15, "none" if lost else "blue")
            d.box(x + 95, y, 50, 15, "none" if lost else "orange")
            if not lost:
                d.path(f"M{x + 52} {y + 7.5}h41", "thin")
        d.text(x + 25, 162, "rows of W₁", "small")
        d.text(x + 116, 162, "columns of W₂", "small")
    d.text(180, 182, "a line is a hidden unit", "small")
    return d


def auto() -> Drawing:
    d = Drawing("Error curves of two decompositions; Auto takes the lower one at each size", 195)
    d.path("M40 10V165H350")
    d.text(195, 182, "parameters of the layer", "small")
    d.text(46, 10, "estimated loss", "small left")
    d.path("M52 40C90 100 150 138 340 154", "blue ink")
    d.path("M52 86C110 112 180 120 340 130", "orange ink")
    d.text(330, 117, "Kronecker", "small right")
    d.text(146, 46, "low rank", "small left")
    d.path("M144 48L88 74", "thin")
    d.path("M133 24V165", "none")
    d.text(84, 150, "Kronecker\nis taken", "small")
    d.text(236, 76, "low rank\nis taken", "small")
    return d


DECOMPOSITIONS = {
    made.__name__.replace("_", "-"): made()
    for made in (
        low_rank,
        kronecker,
        permuted_kronecker,
        tt_matrix,
        tucker,
        cp,
        spatial_low_rank,
        stacked,
        shrink,
        auto,
    )
}
