"""Finding the norms and the attentions of an ONNX graph by what its nodes compute.

One norm, node by node. The graph is `(float16[batch, 4] x) => (float16[batch, 4] y)` with the constants
`two = 2`, `axes = [-1]` and `eps = 1e-05` (which float32 holds as 9.999999747378752e-06) and a float16 `weight` of
four elements. `GraphReader` reads it in order. To the left stands each node, to the right the formula that its output
gets in `GraphReader.terms`; `Normed` lines show the dtype of the product and the steps since::

    wide = Cast <to = 1> (x)              -          root(wide) is x
    squares = Pow (wide, two)             Squares    x^2
    mean = ReduceMean (squares, axes)     Statistic  1 * (1 * mean(x^2) + 0)^1
    shifted = Add (mean, eps)             Statistic  1 * (1 * mean(x^2) + 9.999999747378752e-06)^1
    root = Sqrt (shifted)                 Statistic  1 * (1 * mean(x^2) + 9.999999747378752e-06)^0.5
    normed = Div (wide, root)             Normed     FLOAT
    narrow = Cast <to = 10> (normed)      Normed     FLOAT, cast FLOAT16
    y = Mul (weight, narrow)              Normed     FLOAT, cast FLOAT16, scale FLOAT16 weight

`wide` has no formula of its own: a cast that widens is looked through. `normed` and `narrow` are in
`GraphReader.continued`, because a longer formula goes on from each, so only `y` is asked for a spec. `reading` walks
its steps: the product is float32, the cast to x's dtype comes before the scale, and x was divided by the root::

    NormSpec(eps=1e-05, scale='weight', order='cast_then_scale', root='sqrt')

If `y` had no spec, the formulas before it (`previous`: `narrow`, then `normed`) would be tried. A Reduce node whose
result no norm uses so is in `GraphReader.refusals`, with the reason.

find_norms:
    find_graph_norms: every norm of a model, after its missing types are inferred, and what was refused.
    find_norms: the same for a model whose types are known.
    module_path: the path of the module that nodes belong to.
separate_biases:
    has_bias: whether a node is ONNX Runtime's operator that adds and normalizes, with a bias.
    separate_biases: an Add of its own for each such bias.
dataflow:
    GraphReader: reads a graph node by node and records the formula of every value that may belong to a norm.
terms:
    is_vector: whether a value can be a norm's weight or bias.
    Squares: x^2, element by element.
    Statistic: c * (a * mean(x^2) + b)^p, one number for each row.
    Activated: sigmoid(z) or silu(z).
    Step: what happens to a normalized value: a cast, scale, bias, gate or reshape.
    Normed: a normalized value and the steps since.
fused_ops:
    fused_norm: the norm that a single operator computes (ONNX's, ONNX Runtime's, the plugin's), or why it was refused.
    is_read: whether a value is read by a node or is an output of its graph.
    wrong_epsilon: why an operator with this epsilon is not a norm.
to_spec:
    reading: the NormSpec of a normalized value and the values that it reads, or why there is none.
    Reading: the result of `reading`.
    unfolded: the weight to which 1 was added to give a constant.
    shortest: the shortest decimal of an epsilon's float32 value.
find_attentions:
    find_attentions: the attentions that a graph spells out, and what looks like one, with the reason.
    FoundAttention: one of them: its spec, its inputs, its masks and its result.
    FoundAttentions: all of them, and the refusals.
    MaskPart: what is added to its scores, or replaces some of them.
attention_values:
    KeySide: the key of a product of query and transposed key.
    Repeated: keys or values whose heads are repeated.
    key_side: the key of which a value is the transposition.
    repeated: the keys or values before each of their heads was repeated.
    scaled: a value before a constant factor.
attention_proof:
    difference: why the nodes of an attention do not compute its spec, found by running them in float64.
    feeds_of: random inputs of an attention.
    attend: its formula in float64.
"""
