"""Mistakes in GELU and SwiGLU."""

from support.mistakes.planting import Variants

GELU = Variants(
    "gelu",
    "gelu",
    (
        """
def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
""",
        """
def gelu(x):
    def one(a):
        u = math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)
        return a * (1 + math.tanh(u)) / 2

    return np.vectorize(one)(x)
""",
        """
def gelu(x):
    root = (2 / np.pi) ** 0.5
    inner = x * root * (1 + 0.044715 * np.square(x))
    return x / (1 + np.exp(-2 * inner))  # (1 + tanh u) / 2 = sigmoid(2 u)
""",
    ),
    {
        "the exact GELU": (
            ("np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))",
             "np.vectorize(math.erf)(x / np.sqrt(2))"),
            ("        u =", "        return a * math.erfc(-a / math.sqrt(2)) / 2\n        u ="),
            ("    return x / (1 + np.exp(-2 * inner))",
             "    phi = [0.5 * (1 + math.erf(a / 2**0.5)) for a in x.ravel()]\n"
             "    return x * np.reshape(phi, x.shape)"),
        ),
        "the root": (
            ("np.sqrt(2 / np.pi) * ", ""),
            ("math.sqrt(2 / math.pi) * ", ""),
            ("x * root *", "x *"),
        ),
        "2 / pi without the root": (
            ("np.sqrt(2 / np.pi)", "2 / np.pi"),
            ("math.sqrt(2 / math.pi)", "(2 / math.pi)"),
            (" ** 0.5", ""),
        ),
        "no cubic term": (
            ("(x + 0.044715 * x**3)", "x"),
            (" + 0.044715 * a * a * a", ""),
            (" * (1 + 0.044715 * np.square(x))", ""),
        ),
        "no half": (
            ("0.5 * x", "x"),
            (" / 2\n", "\n"),
            ("x / (1", "2 * x / (1"),
        ),
    },
)  # fmt: skip

GELU_GRADIENT = Variants(
    "gelu",
    "gelu_gradient",
    (
        """
def gelu_gradient(grad, x):
    k = np.sqrt(2 / np.pi)
    t = np.tanh(k * (x + 0.044715 * x**3))
    du = k * (1 + 3 * 0.044715 * x**2)
    return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du)
""",
        """
def gelu_gradient(grad, x):
    dx = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        a, k = x[i], math.sqrt(2 / math.pi)
        t = math.tanh(k * a + k * 0.044715 * a**3)
        inner = k + k * 0.044715 * 3 * a**2
        slope = (1 + t) / 2
        slope += a / 2 * inner / math.cosh(k * a + k * 0.044715 * a**3) ** 2
        dx[i] = grad[i] * slope
    return dx
""",
        """
def gelu_gradient(grad, x):
    root = (2 / np.pi) ** 0.5
    s = 1 / (1 + np.exp(-2 * root * (x + 0.044715 * x**3)))
    du = root + root * 0.134145 * x * x
    left = s
    right = x * 2 * s * (1 - s) * du
    return (left + right) * grad
""",
    ),
    {
        "the inner derivative missing": (
            (" * du)", ")"),
            ("a / 2 * inner /", "a / 2 /"),
            (" * du", ""),
        ),
        "the 3 missing": (
            ("3 * 0.044715", "0.044715"),
            ("0.044715 * 3 *", "0.044715 *"),
            ("0.134145", "0.044715"),
        ),
        "the product rule": (
            ("0.5 * (1 + t) + ", ""),
            ("slope = (1 + t) / 2", "slope = 0"),
            ("(left + right)", "right"),
        ),
        "grad missing": (
            ("grad * (", "("),
            ("grad[i] * ", ""),
            (" * grad", ""),
        ),
    },
)

SWIGLU = Variants(
    "swiglu",
    "swiglu",
    (
        """
def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up
""",
        """
def swiglu(gate, up):
    y = np.zeros(gate.shape)
    for r in range(gate.shape[0]):
        for c in range(gate.shape[1]):
            a, b = gate[r, c], up[r, c]
            sigma = 1 / (1 + math.exp(-a))
            y[r, c] = a * sigma * b
    return y
""",
        """
def swiglu(gate, up):
    def silu(a):
        return 0.5 * a * (1 + np.tanh(a / 2))

    return np.einsum("...,...->...", silu(gate), up)
""",
    ),
    {
        "gate and up exchanged": (
            ("gate / (1 + np.exp(-gate)) * up", "gate * (up / (1 + np.exp(-up)))"),
            ("a, b = gate[r, c], up[r, c]", "b, a = gate[r, c], up[r, c]"),
            ("silu(gate), up", "gate, silu(up)"),
        ),
        "the sigmoid alone": (
            ("gate / (1", "1 / (1"),
            ("a * sigma * b", "sigma * b"),
            ("0.5 * a *", "0.5 *"),
        ),
        "no up": (
            (" * up", ""),
            ("* sigma * b", "* sigma"),
            ('np.einsum("...,...->...", silu(gate), up)', "silu(gate)"),
        ),
    },
)

SWIGLU_GRADIENT = Variants(
    "swiglu",
    "swiglu_gradient",
    (
        """
def swiglu_gradient(grad, gate, up):
    s = 1 / (1 + np.exp(-gate))
    dgate = grad * up * (s + gate * s * (1 - s))
    dup = grad * gate * s
    return dgate, dup
""",
        """
def swiglu_gradient(grad, gate, up):
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    for i in np.ndindex(*gate.shape):
        a = gate[i]
        s = 1 / (1 + math.exp(-a))
        slope = s * (1 + a * (1 - s))
        dgate[i] = grad[i] * up[i] * slope
        dup[i] = grad[i] * a * s
    return dgate, dup
""",
        """
def swiglu_gradient(grad, gate, up):
    e = np.exp(-gate)
    silu = gate / (1 + e)
    quotient = ((1 + e) + gate * e) / (1 + e) ** 2
    through = np.multiply(grad, up)
    return through * quotient, grad * silu
""",
    ),
    {
        "the slope of the sigmoid alone": (
            ("(s + gate * s * (1 - s))", "s * (1 - s)"),
            ("s * (1 + a * (1 - s))", "s - s**2"),
            ("((1 + e) + gate * e)", "e"),
        ),
        "sigmoid taken for a constant": (
            (" + gate * s * (1 - s)", ""),
            ("s * (1 + a * (1 - s))", "s"),
            (" + gate * e", ""),
        ),
        "dgate and dup exchanged": (
            ("return dgate, dup", "return dup, dgate"),
            ("return dgate, dup", "return dup, dgate"),
            ("through * quotient, grad * silu", "grad * silu, through * quotient"),
        ),
        "up missing in dgate": (
            ("grad * up *", "grad *"),
            ("grad[i] * up[i] *", "grad[i] *"),
            ("np.multiply(grad, up)", "grad"),
        ),
    },
)

VARIANTS = [GELU, GELU_GRADIENT, SWIGLU, SWIGLU_GRADIENT]
