"""One module per way to run a sequence. Each has the same names, and a test keeps their signatures equal:

NAME
reasons(problem) -> why it can't serve that problem; empty when it can
plan(problem)    -> what it would do, in a sentence
method(problem, backward, stacked) -> how it would run one way through time, in a word or two, for profilers
memory(problem)  -> a problem.Memory: the bytes it would take
warmup(problem)  -> the names of its kernels, compiled now for the current device; none where nothing is compiled
forward(cell, x, weights, state, *, reverse, tf32, save, step_exact) -> y, last, tape
backward(cell, x, weights, state, y, tape, dy, dlast, *, reverse, tf32, needs) -> gradients
history(cell, tape, *, reverse, like) -> the other states after every instant
factors(x, weights) -> both as the library has them by which it multiplies

One that takes states as a layer of one has them, [1, B, .], and then gives them and their gradients so, has, too:

LAYERED

One that can run several directions of a layer at once has, too:

forwards(cell, directions, *, tf32, save, step_exact) -> what forward gives, for each problem.Direction
backwards(cell, directions, recorded, *, tf32, needs) -> gradients of each; recorded: (y, tape, dy, dlast, dhistory)

One that can run the layers of a stack at once:

stacks(problem, backward) -> whether it would, one way through time, for the problem of any of its layers
stack(cell, x, layers, *, tf32, save) -> what forward gives, for each layer's (weights, state)
stack_back(cell, x, layers, recorded, *, tf32, needs) -> gradients of each; recorded as above, dy None where only the
    layer above asks for y; x is that of the first alone

x      [T, B, I], or [T, B, G*H] without w_ih; never written to
weights  problem.Weights
state  h0 [B, P], then [B, H] for every further state; P = H without projection
y      [T, B, P], every h_t        last     the states after the last instant, as state
tape   tuple of arrays that only the backend understands; backward never writes to them
tf32   whether float32 products, all of them, may be rounded to TF32
step_exact  whether y has to be what forward of an instant after the other gives, bit for bit
needs  names of the gradients wanted, of x w_ih w_hh b_ih b_hh w_hr state
gradients  dict of name -> array, all those in needs; "state" a tuple
"""
