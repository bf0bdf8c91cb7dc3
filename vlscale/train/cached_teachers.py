"""What a run asks of its teacher cache before anything else is built: that it is whole, and of these teachers."""

from dataclasses import replace

from vlscale.data.manifest import Manifest
from vlscale.data.teacher_cache import BadTeacherCache, CacheHeader, read_header
from vlscale.data.teacher_files import cache_place
from vlscale.data.teacher_join import Lacking, check_cache, find_lacking
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import AugmentConfig, Config, TeacherConfig
from vlscale.train.frozen_teachers import difference, load_image_teacher, load_text_teacher


def check_teacher_cache(config: Config, manifest: Manifest, ranks: Ranks) -> CacheHeader | None:
    """What the corpus's cache is of; None where there is none. Raises the same BadTeacherCache on every rank; the
    ranks share the work."""
    if config.teacher_cache is None:
        return None
    folder = cache_place(config.teacher_cache, config.data)
    header = read_header(folder)
    if config.data.augment != AugmentConfig():
        get_logger().info("%s: its teachers saw the pictures without data.augment", folder)
    manifest = replace(manifest, sources=None)  # a cache is of shards, however they are mixed
    parts = ranks.gather_objects(find_lacking(folder, manifest, part=(ranks.rank, ranks.size)))
    check_cache(header, folder, config.data, manifest, Lacking.join(parts))
    changed = ranks.from_first(_changed_teachers(config.teacher, header) if ranks.first else None)
    if changed:
        raise BadTeacherCache(f"teacher.cache={folder}: {changed}; teach anew into another folder, or leave it out")
    return header


def _changed_teachers(teacher: TeacherConfig, header: CacheHeader) -> str | None:
    """How teacher.image and teacher.text, where they are given, differ from those of the cache."""
    loaders = {"image": load_image_teacher, "text": load_text_teacher}
    for name, load in loaders.items():
        path, cached = getattr(teacher, name), getattr(header, name)
        try:
            given = load(path).facts if path else cached
        except ValueError as error:
            return f"teacher.{name}: {error}"
        differs = difference(given, cached)
        if differs is not None:
            part, got, expected = differs
            return (
                f"teacher.{name}={path} is another teacher than the cache was made with ({part} hash {got}, the cache "
                f"has {expected}, of {cached.source})"
            )
    return None
