"""What tools that read types see of `mpass`; tests hold it against the names that are exported."""

from mpass import errors as errors
from mpass import patterns as patterns
from mpass.backend import compile as compile
from mpass.calibration.denoising import search_denoising as search_denoising
from mpass.calibration.search import calibrate as calibrate
from mpass.config.decorators import configure as configure
from mpass.config.layer import LayerConfig as LayerConfig
from mpass.config.sparse_config import SparseConfig as SparseConfig
from mpass.errors import MpassError as MpassError
from mpass.exported import rewrite_exported as rewrite_exported
from mpass.functional import attend as attend
from mpass.functional import computed_mask as computed_mask
from mpass.functional import density as density
from mpass.functional import sparse_attention as sparse_attention
from mpass.inspection.doctor import diagnose as diagnose
from mpass.inspection.explanation import explain as explain
from mpass.inspection.profiling import profile as profile
from mpass.lowering.denoising import DenoisingRun as DenoisingRun
from mpass.lowering.denoising import denoising as denoising
from mpass.lowering.denoising_plan import DenoisingPlan as DenoisingPlan
from mpass.lowering.kv_selection import KVSelection as KVSelection
from mpass.lowering.kv_selection import SnapKV as SnapKV
from mpass.lowering.kv_selection import select_keys as select_keys
from mpass.lowering.recorder import record as record
from mpass.lowering.tiles import Grid as Grid
from mpass.patterns.a_shape import AShape as AShape
from mpass.patterns.base import Pattern as Pattern
from mpass.patterns.block_max import BlockMax as BlockMax
from mpass.patterns.block_sparse import BlockSparse as BlockSparse
from mpass.patterns.block_top_p import BlockTopP as BlockTopP
from mpass.patterns.dense import Dense as Dense
from mpass.patterns.flex_prefill import FlexPrefill as FlexPrefill
from mpass.patterns.sample_attention import SampleAttention as SampleAttention
from mpass.patterns.strided import Strided as Strided
from mpass.patterns.tri_shape import TriShape as TriShape
from mpass.patterns.union import Union as Union
from mpass.patterns.union import VerticalBlock as VerticalBlock
from mpass.patterns.vertical_slash import VerticalSlash as VerticalSlash
from mpass.patterns.x_attention import XAttention as XAttention
from mpass.report import Report as Report
from mpass.report import reports as reports
from mpass.serving.kv_cache import compress as compress
from mpass.serving.transformers_attention import register_attention as register_attention
from mpass.story.merge import last_report as last_report

__version__: str
