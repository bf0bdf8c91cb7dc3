"""What a run asks of its teacher cache before anything else is built: that it is whole, and of these teachers."""

from vlscale.data.samples import open_corpus
from vlscale.data.teacher_cache import BadTeacherCache, CacheHeader, TeacherFacts, read_header
from vlscale.data.teacher_files import cache_place
from vlscale.data.teacher_join import Lacking, check_cache, find_lacking
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import AugmentConfig, Config, TeacherConfig
from vlscale.train.frozen_teachers import load_image_teacher, load_text_teacher


def check_teacher_cache(config: Config, ranks: Ranks) -> None:
    """Raises the same BadTeacherCache on every rank; the ranks share the work. Nothing where there is no cache."""
    if config.teacher_cache is None:
        return
    folder = cache_place(config.teacher_cache, config.data)
    header = read_header(folder)
    if config.data.augment != AugmentConfig():
        get_logger().info("%s: its teachers saw the pictures without data.augment", folder)
    manifest = open_corpus(config.data.train, config.data, "data.train")
    parts = ranks.gather_objects(find_lacking(folder, manifest, part=(ranks.rank, ranks.size)))
    check_cache(header, folder, config.data, manifest, Lacking.join(parts))
    changed = ranks.from_first(_changed_teachers(config.teacher, header) if ranks.first else None)
    if changed:
        raise BadTeacherCache(f"teacher.cache={folder}: {changed}; teach anew into another folder, or leave it out")


def _changed_teachers(teacher: TeacherConfig, header: CacheHeader) -> str | None:
    """How teacher.image and teacher.text, where they are given, differ from those of the cache."""
    loaders = {"image": load_image_teacher, "text": load_text_teacher}
    for name, load in loaders.items():
        path, cached = getattr(teacher, name), getattr(header, name)
        try:
            given = load(path).facts if path else cached
        except ValueError as error:
            return f"teacher.{name}: {error}"
        for what in ("weights", "preprocessing"):
            if getattr(given, what) != getattr(cached, what):
                return _difference(f"teacher.{name}={path}", what, given, cached)
    return None


def _difference(what: str, part: str, given: TeacherFacts, cached: TeacherFacts) -> str:
    return (
        f"{what} is another teacher than the cache was made with ({part} hash {getattr(given, part)}, the cache has "
        f"{getattr(cached, part)}, of {cached.source})"
    )
