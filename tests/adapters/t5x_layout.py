"""T5X's checkpoint layouts, made array by array with TensorStore: nothing of ours, T5X or Orbax."""

import json

import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util


def write_orbax(folder, step, tree):
    """`checkpoint_<step>/state`: one OCDBT database of zarr arrays, and what Orbax says of them."""
    state = folder / f"checkpoint_{step}" / "state"
    state.mkdir(parents=True)
    database = {"driver": "ocdbt", "base": f"file://{state}/"}
    described = {}
    for path, value in traverse_util.flatten_dict(tree).items():
        _write_zarr(database | {"path": f"{'.'.join(path)}/"}, value)
        described[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(value.shape),
            },
        }
    metadata = {
        "tree_metadata": described,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (state / "_METADATA").write_text(json.dumps(metadata))
    return state.parent


def write_first_orbax(folder, step, tree):
    """`checkpoint_<step>/state` as the first versions had it: msgpack with places for the arrays,
    each of which is a folder; nothing says what there is."""
    state = folder / f"checkpoint_{step}" / "state"
    state.mkdir(parents=True)
    said = {}
    for path, value in traverse_util.flatten_dict(tree).items():
        name = ".".join(path)
        _write_zarr({"driver": "file", "path": f"{state}/{name}/"}, value)
        said[path] = f"PLACEHOLDER://{name}"
    contents = serialization.msgpack_serialize(traverse_util.unflatten_dict(said))
    (state / "checkpoint").write_bytes(contents)
    return state.parent


def write_legacy(folder, step, tree, driver="file"):
    """`checkpoint_<step>/checkpoint`, msgpack, and a folder for each array but scalars."""
    place = folder / f"checkpoint_{step}"
    place.mkdir(parents=True)
    said = {}
    for path, value in traverse_util.flatten_dict(tree).items():
        if not value.ndim:
            said[path] = value
            continue
        name = f"{'.'.join(path)}/"
        spec = {"driver": "zarr", "dtype": str(value.dtype)}
        metadata = {
            "chunks": list(value.shape),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(value.shape),
        }
        _write_zarr({"driver": "file", "path": f"{place}/{name}"}, value, metadata["compressor"])
        if driver == "gcs":  # as of a checkpoint that was copied from a bucket
            store = {"driver": "gcs", "bucket": "somewhere", "path": f"models/{name}"}
        else:
            store = {"driver": driver, "path": name}
        said[path] = {**spec, "kvstore": store, "metadata": metadata}
    contents = {"version": 3, "optimizer": traverse_util.unflatten_dict(said)}
    (place / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    return place


def arrays_in(state):
    """The zarr metadata of each array in an OCDBT database, by name."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
    keys = [key.decode() for key in store.list().result()]
    return {
        key.removesuffix("/.zarray"): json.loads(store.read(key).result().value)
        for key in keys
        if key.endswith("/.zarray")
    }


def _write_zarr(store, value, compressor=None):
    spec = {
        "driver": "zarr",
        "kvstore": store,
        "metadata": {
            "shape": list(value.shape),
            "chunks": list(value.shape),
            "dtype": np.dtype(value.dtype).str,
            "compressor": compressor or {"id": "zstd", "level": 1},
        },
    }
    ts.open(spec, create=True).result().write(value).result()
