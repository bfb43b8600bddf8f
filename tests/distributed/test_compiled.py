"""What is read off a compiled program is what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.distributed import partitioning
from recexplore.distributed.compiled import Collective, Talk, memory_of, read_text


def program(entry, *computations):
    """HLO text as the compiler writes it."""
    texts = [*computations, ("ENTRY %main.1_spmd (p: f32[8]) -> f32[8]", entry)]
    body = "\n\n".join(
        "\n".join([f"{header} {{", *(f"  {line}" for line in lines), "}"])
        for header, lines in texts
    )
    return f"HloModule jit_f, is_scheduled=true, num_partitions=8\n\n{body}\n"


REDUCE = (
    "%r = f32[100]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add"
)
ADD = ("%add (a: f32[], b: f32[]) -> f32[]", ["ROOT %s = f32[] add(%a, %b)"])


def loop_over(body, limit=None, known=None):
    """The line of a loop, and its condition."""
    said = f', backend_config={{"known_trip_count":{{"n":"{known}"}}}}' if known else ""
    line = f"%w = (s32[], f32[100]) while(%t), condition=%until_{body}, body=%{body}{said}"
    compared = [f"%n = s32[] constant({limit})"] if limit else []
    compared.append("ROOT %c = pred[] compare(%i, %n), direction=LT")
    return line, (f"%until_{body} (p: (s32[], f32[100])) -> pred[]", compared)


def test_a_collective_counts_the_bytes_a_device_ends_up_with():
    assert read_text(program([REDUCE], ADD)) == Talk({"all-reduce": Collective(1, 400)}, 0)


def test_a_program_without_any_is_silent():
    assert read_text(program(["ROOT %y = f32[8] add(%p, %p)"])) == Talk({}, 0)


def test_a_loop_counts_up_to_the_limit_of_its_condition():
    line, condition = loop_over("body", limit=7)
    body = ("%body (p: (s32[], f32[100])) -> (s32[], f32[100])", [REDUCE])
    found = read_text(program([line, REDUCE], ADD, body, condition))
    assert found.collectives == {"all-reduce": Collective(7 + 1, (7 + 1) * 400)}


def test_the_compiler_s_own_count_goes_before_the_limit():
    """A loop may begin elsewhere than at 0, or its limit be among what it carries."""
    body = ("%body (p: (s32[], f32[100])) -> (s32[], f32[100])", [REDUCE])
    for limit in (9, None):
        line, condition = loop_over("body", limit=limit, known=4)
        found = read_text(program([line], ADD, body, condition))
        assert found.collectives == {"all-reduce": Collective(4, 1600)}


def test_a_loop_whose_end_nothing_tells_counts_once():
    line, condition = loop_over("body")
    body = ("%body (p: (s32[], f32[100])) -> (s32[], f32[100])", [REDUCE])
    assert read_text(program([line], ADD, body, condition)).collectives["all-reduce"].count == 1


def test_nested_loops_multiply():
    inner, until_inner = loop_over("inner", limit=5)
    outer, until_outer = loop_over("outer", limit=3)
    bodies = [
        ("%inner (p: (s32[], f32[100])) -> (s32[], f32[100])", [REDUCE]),
        ("%outer (p: (s32[], f32[100])) -> (s32[], f32[100])", [inner, REDUCE]),
    ]
    found = read_text(program([outer], ADD, *bodies, until_inner, until_outer))
    assert found.collectives == {"all-reduce": Collective(3 * 5 + 3, (3 * 5 + 3) * 400)}


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("%g = bf16[16,4]{1,0} all-gather(%x), dimensions={0}", "all-gather", 16 * 4 * 2),
        ("%g = (f32[8], s8[3]) all-to-all(%x, %y)", "all-to-all", 8 * 4 + 3),
        ("%g = pred[] all-reduce(%x), to_apply=%add", "all-reduce", 1),
        ("ROOT %g = f8e4m3fn[10] collective-permute(%x)", "collective-permute", 10),
        # Started: (operands, results, contexts), but for all-reduce, which has results alone.
        ("%g = (f32[2], f32[16]) all-gather-start(%x), dimensions={0}", "all-gather", 64),
        (
            "%g = ((f32[2]{0:T(128)}, f32[3]), (f32[16], f32[24]{0:T(8,128)S(1)})) "
            "all-gather-start(%x, %y)",
            "all-gather",
            (16 + 24) * 4,
        ),
        ("%g = f32[100] all-reduce-start(%x), to_apply=%add", "all-reduce", 400),
        ("%g = (f32[100], f32[7]) all-reduce-start(%x, %y)", "all-reduce", 428),
        (
            "%g = (f32[64,2], f32[64,2], u32[], u32[]) collective-permute-start(%x)",
            "collective-permute",
            512,
        ),
        ("%g = ((f32[16]), f32[2], u32[]) reduce-scatter-start(%x)", "reduce-scatter", 8),
    ],
)
def test_shapes_are_read_as_they_are_written(line, kind, size):
    done = f"%d = f32[1] {kind}-done(%g)"  # says nothing new
    assert read_text(program([line, done], ADD)).collectives == {kind: Collective(1, size)}


def test_a_collective_inside_a_started_call_counts_once():
    line = "%s = ((f32[8]), f32[8], u32[]) async-start(%x), calls=%wrapped"
    wrapped = ("%wrapped (p: f32[8]) -> f32[8]", ["ROOT %a = f32[8] all-to-all(%p)"])
    done = "%d = f32[8] async-done(%s)"
    found = read_text(program([line, done], wrapped)).collectives
    assert found == {"all-to-all": Collective(1, 32)}


@pytest.mark.parametrize(
    "which",
    [
        "branch_computations={%little, %much, %none}",
        "true_computation=%little, false_computation=%much",
    ],
)
def test_of_several_branches_the_dearest_counts(which):
    branches = [
        ("%little (p: f32[8]) -> f32[8]", ["ROOT %a = f32[8] all-reduce(%p), to_apply=%add"]),
        ("%much (p: f32[8]) -> f32[8]", ["ROOT %a = f32[80] all-gather(%p)"]),
        ("%none (p: f32[8]) -> f32[8]", ["ROOT %a = f32[8] add(%p, %p)"]),
    ]
    line = f"%c = f32[8] conditional(%i, %x, %x), {which}"
    found = read_text(program([line], ADD, *branches))
    assert found.collectives == {"all-gather": Collective(1, 320)}


def test_cycles_of_a_fusion_have_those_of_its_parts_in_them():
    def cycles(count):
        return f'backend_config={{"estimated_cycles":"{count}"}}'

    line, condition = loop_over("body", limit=3)
    computations = [
        ("%fused (p: f32[8]) -> f32[8]", [f"ROOT %m = f32[8] multiply(%p, %p), {cycles(11)}"]),
        (
            "%body (p: (s32[], f32[100])) -> (s32[], f32[100])",
            [f"%f = f32[8] fusion(%x), kind=kLoop, calls=%fused, {cycles(100)}"],
        ),
        ("%called (p: f32[8]) -> f32[8]", [f"ROOT %m = f32[8] add(%p, %p), {cycles(7)}"]),
    ]
    entry = [line, "%k = f32[8] call(%x), to_apply=%called", f"%c = f32[8] copy(%p), {cycles(2)}"]
    assert read_text(program(entry, *computations, condition)).cycles == 3 * 100 + 7 + 2


@pytest.fixture(scope="module")
def mesh():
    return partitioning.make_mesh(data=8)


def compiled(mesh, function, *shapes):
    """A function that runs on every device, on arrays that all of them have."""
    everywhere = jax.shard_map(
        function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(everywhere).lower(*arguments).compile()


def test_a_real_sum_over_devices_is_found(mesh):
    found = compiled(mesh, lambda a: jax.lax.psum(a, "data"), (12, 5))
    assert read_text(found.as_text()) == Talk({"all-reduce": Collective(1, 12 * 5 * 4)}, 0)


def test_a_real_sum_in_nested_loops_counts_as_often_as_it_runs(mesh):
    def sums(a):
        def inner(c, _):
            return c * jax.lax.psum(c, "data"), None

        def outer(c, _):
            return jax.lax.scan(inner, c, length=5)[0], None

        return jax.lax.scan(outer, a, length=3)[0]

    found = read_text(compiled(mesh, sums, (100,)).as_text())
    assert found.collectives == {"all-reduce": Collective(15, 15 * 400)}


def test_a_real_loop_that_begins_late_counts_only_what_runs(mesh):
    def sums(a):
        def step(carried):
            index, c = carried
            return index + 1, c * jax.lax.psum(c, "data")

        return jax.lax.while_loop(lambda carried: carried[0] < 10, step, (4, a))[1]

    found = read_text(compiled(mesh, sums, (100,)).as_text())
    assert found.collectives == {"all-reduce": Collective(6, 6 * 400)}


def test_real_products_of_dealt_out_matrices_gather_what_they_need(mesh):
    """x [8 shares of rows] @ w [8 shares of rows]: w, 32 × 16 numbers, must come together."""
    rows = partitioning.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)
    found = jax.jit(lambda x, w: x @ w, out_shardings=rows).lower(x, w).compile()
    assert read_text(found.as_text()).collectives == {"all-gather": Collective(1, 32 * 16 * 4)}


def test_memory_is_that_of_one_device_and_donated_arguments_count_once(mesh):
    rows, kept = partitioning.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
    state = jax.ShapeDtypeStruct((64, 1000), np.float32, sharding=rows)
    other = jax.ShapeDtypeStruct((10,), np.float32, sharding=kept)

    def step(state, other):
        return state + other[0], other * 2

    results = {"out_shardings": (rows, kept)}
    plain = memory_of(jax.jit(step, **results).lower(state, other).compile())
    assert plain.arguments == 64 * 1000 * 4 // 8 + 40
    tables = 2 * 8  # where the results lie: a pointer each
    assert 0 <= plain.results - plain.arguments <= tables
    donated = memory_of(jax.jit(step, donate_argnums=0, **results).lower(state, other).compile())
    assert donated.arguments == plain.arguments
    assert donated.results == plain.results - 64 * 1000 * 4 // 8
    assert donated.peak == sum(donated)
