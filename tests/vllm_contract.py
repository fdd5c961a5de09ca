"""What the plugin touches of vLLM, and a checker that reads it in vLLM's sources without importing them.

`CONTRACT` is the list; `differences` compares it with the sources of one version and says all that moved.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

# ---- the contract -------------------------------------------------------------------------------------------------
#
# An entry is a name, `module:Name` or `module:Class.method`, with the reason for it, and below it what we need of it.
# A deeper line continues the one above.
#
#   subclassed          ours derives from it: each of its abstract methods must be among those that we override
#   since 0.33          older versions need not have it
#   overrides f(a, b)   ours replaces it: vLLM's parameters are these, `...` stands for more that ours passes on unread
#   calls f(a, b=)      we call it so: by position, then by name (`b=`); vLLM may have more that are optional.
#                       The class's own name stands for its constructor.
#   has a b c           we read or set them: fields, properties or class variables, but not methods
#
# A method counts as a plain one where `classmethod`, `staticmethod` or `property` does not precede its name. The others
# are about the code at the name, which must still do what we rely on:
#
#   does a, b, c        call these, in this order
#   does 2 x a if c     call a in the body of an `if c`, so often
#   says text           contain this, written as ast.unparse writes it
#   takes module:Class  have a parameter for each field of that class

_CONTRACT = """
# registering: plugin.py

vllm.version:__version_tuple__ -- is this vLLM supported
vllm.logger:init_logger -- our log lines
    calls init_logger(name)
vllm.plugins:DEFAULT_PLUGINS_GROUP -- our entry point
    says DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'
vllm.v1.attention.backends.registry:register_backend -- the name of the backend
    calls register_backend(backend, class_path)
vllm.v1.attention.backends.registry:AttentionBackendEnum -- the backend's member, its class and path
    calls get_class(self)
    calls get_path(self)
vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory -- the name of the connector
    calls classmethod register_connector(cls, name, module_path, class_name)
    has _registry
vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.create_connector -- three arguments
    says connector_cls(config, role, kv_cache_config)

# choosing the backend of a layer: plugin.py

vllm.platforms:current_platform -- the platform in use
vllm.platforms.interface:Platform -- its choice of a backend is wrapped
    overrides classmethod get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads)
    calls classmethod get_device_capability(cls)
    calls is_cpu(self)
vllm.platforms.cpu:CpuPlatform -- its choice of a backend is wrapped
    overrides classmethod get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads)
vllm.platforms.cuda:CudaPlatformBase -- its choice of a backend is wrapped
    overrides classmethod get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads)
vllm.v1.attention.selector:_cached_get_attn_backend -- asks the platform with the arguments that our wrapper takes
    says current_platform.get_attn_backend_cls(backend, attn_selector_config=attn_selector_config, num_heads=num_heads)
vllm.v1.attention.selector:AttentionSelectorConfig -- is this layer ours; passed on as a dict
    has has_sliding_window attn_type
    says class AttentionSelectorConfig(NamedTuple)
vllm.v1.attention.backend:AttentionBackend.validate_configuration -- is given the device and what the selector knows
    takes vllm.v1.attention.selector:AttentionSelectorConfig
    says device_capability
vllm.v1.attention.backend:AttentionType -- plugin.py compares with these values
    has DECODER
    says DECODER = 'decoder'
    says ENCODER = 'encoder'
    says ENCODER_ONLY = 'encoder_only'

# configuration: plugin.py, and what others read of it

vllm.engine.arg_utils:EngineArgs -- completed and checked; the demo sets the second half
    overrides create_engine_config(self, ...)
    overrides create_model_config(self)
    has attention_backend attention_config kv_transfer_config kv_offloading_size speculative_config worker_cls
        scheduler_cls block_size enable_prefix_caching max_model_len additional_config num_gpu_blocks_override
    has model max_num_seqs max_num_batched_tokens enforce_eager kv_cache_memory_bytes disable_log_stats
vllm.engine.arg_utils:EngineArgs.__post_init__ -- our wrappers are in place before they are needed
    does load_general_plugins
vllm.engine.arg_utils:EngineArgs.create_engine_config -- our wrapper makes the model's configuration
    does self.create_model_config, VllmConfig
vllm.config.attention:AttentionConfig -- is InfLLM selected
    has backend
vllm.config:KVTransferConfig -- switches the connector on
    calls KVTransferConfig(kv_connector=, kv_role=)
    has kv_connector
vllm.config.kv_transfer:KVProducer -- our role is a known one
    says 'kv_both'
vllm.config:VllmConfig -- everywhere
    has model_config cache_config scheduler_config parallel_config compilation_config additional_config
        max_in_flight_tokens
vllm.config:get_current_vllm_config -- attention/backend.py: a layer is not given the configuration
    calls get_current_vllm_config()
vllm.config:ModelConfig -- models are refused, the length is lifted
    has model max_model_len original_max_model_len use_mla uses_alibi is_encoder_decoder is_hybrid has_inner_state
        is_attention_free attn_type
vllm.config.cache:CacheConfig -- refused: quantized; worker/cpu.py sizes the cache, the demo reads its size
    has cache_dtype kv_cache_memory_bytes num_gpu_blocks
vllm.config.scheduler:SchedulerConfig -- sizes are checked, our scheduler is set
    has long_prefill_token_threshold disable_hybrid_kv_cache_manager max_num_batched_tokens async_scheduling
        scheduler_cls max_num_seqs max_num_scheduled_tokens
vllm.config.parallel:ParallelConfig -- more than one device is refused, our worker is set
    has tensor_parallel_size pipeline_parallel_size data_parallel_size decode_context_parallel_size enable_dbo
        worker_cls
vllm.config.compilation:CompilationConfig -- worker/base.py, memory/connector.py, attention/metadata.py: the layers
    has static_forward_context
vllm.v1.kv_cache_interface:is_quantized_kv_cache -- refuses quantized caches
    calls is_quantized_kv_cache(kv_cache_dtype)

# scheduling: scheduler.py

vllm.v1.core.sched.scheduler:Scheduler -- prefill chunks are cut by what cuts them for Mamba
    subclassed
    overrides __init__(self, ...)
    overrides _mamba_block_aligned_split(self, request, num_new_tokens, num_new_local_computed_tokens,
        num_external_computed_tokens)
    overrides update_from_output(self, scheduler_output, model_runner_output)
    calls get_request_counts(self)
    has need_mamba_block_aligned_split vllm_config connector
vllm.v1.core.sched.scheduler:Scheduler.__init__ -- memory/connector.py is given the block manager
    does KVCacheManager, self.connector.bind_kv_cache_manager
vllm.v1.core.sched.scheduler:Scheduler.schedule -- running and waiting requests are cut; the connector speaks last
    does 2 x self._mamba_block_aligned_split if self.need_mamba_block_aligned_split
    does self.connector.update_state_after_alloc, SchedulerOutput, self._build_kv_connector_meta
vllm.v1.core.sched.async_scheduler:AsyncScheduler -- the same on accelerators
    subclassed
vllm.v1.request:Request -- also memory/connector.py
    has request_id num_computed_tokens num_tokens num_prompt_tokens max_tokens sampling_params
vllm.v1.outputs:ModelRunnerOutput -- the connector is told first what the worker sent
    has kv_connector_output
vllm.v1.core.sched.output:SchedulerOutput -- memory/connector.py: the plan must be there before the forward pass
    has has_sync_kv_loads

# the block manager: memory/manager.py; its spec also worker/base.py

vllm.v1.kv_cache_interface:KVCacheSpec -- the memory plan
    calls max_memory_usage_bytes(self, vllm_config)
vllm.v1.kv_cache_interface:AttentionSpec -- what ours takes over
    has block_size num_kv_heads head_size dtype page_size_bytes
vllm.v1.kv_cache_interface:FullAttentionSpec -- what a layer of ours has before
vllm.v1.kv_cache_interface:SlidingWindowSpec -- InfLLMSpec
    subclassed
    overrides max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len)
    calls SlidingWindowSpec(block_size=, num_kv_heads=, head_size=, dtype=, sliding_window=)
vllm.v1.kv_cache_interface:SlidingWindowSpec -- model runner V2 must not null a block-table entry of ours
    since 0.33
    overrides property num_retained_tokens
vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache -- nothing else decides what is nulled
    since 0.33
    says layer_spec.num_retained_tokens if isinstance(layer_spec, SlidingWindowSpec) else 0
vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry -- spec and manager are registered
    calls classmethod _ensure_registered(cls)
    calls classmethod register(cls, kvcache_spec_cls, manager_class, uniform_type_base_spec=)
vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager -- InfLLMManager
    subclassed
    overrides __init__(self, kv_cache_spec, **kwargs)
    overrides get_num_skipped_tokens(self, num_computed_tokens)
    overrides remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens)
    overrides get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, ...)
    overrides allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model)
    overrides pop_blocks_for_free(self, request_id)
    calls _remove_blocks_in_range(self, request_id, first_block, last_block)
    has kv_cache_spec block_size enable_caching block_pool req_to_blocks
vllm.v1.core.single_type_kv_cache_manager:get_manager_for_kv_cache_spec -- our admission cap is asked for
    says SlidingWindowSpec
    does kv_cache_spec.max_admission_blocks_per_request, manager_class
vllm.v1.core.block_pool:BlockPool -- a request waits when units are short
    calls get_num_free_blocks(self)
vllm.v1.core.kv_cache_utils:KVCacheBlock -- the first one names the request
    has block_id is_null
vllm.v1.core.kv_cache_manager:KVCacheManager -- memory/connector.py finds our managers
    has coordinator
vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots -- stored blocks are freed before others are taken
    does self.coordinator.remove_skipped_blocks, self.coordinator.get_num_blocks_to_allocate,
        self.coordinator.allocate_new_blocks
vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator -- memory/connector.py finds our managers
    has single_type_managers
vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate -- each manager counts its own
    does manager.get_num_blocks_to_allocate
vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.remove_skipped_blocks -- each manager frees its own
    does manager.remove_skipped_blocks
vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.pop_blocks_for_free -- each manager takes back its own
    does manager.pop_blocks_for_free

# the connector: memory/connector.py

vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1 -- InfLLMConnector
    subclassed
    overrides __init__(self, vllm_config, role, kv_cache_config)
    overrides property requires_kv_delivery
    overrides bind_kv_cache_manager(self, kv_cache_manager)
    overrides get_num_new_matched_tokens(self, request, num_computed_tokens)
    overrides update_state_after_alloc(self, request, blocks, num_external_tokens)
    overrides build_connector_meta(self, scheduler_output)
    overrides register_kv_caches(self, kv_caches)
    overrides start_load_kv(self, forward_context, **kwargs)
    overrides wait_for_layer_load(self, layer_name)
    overrides save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs)
    overrides wait_for_save(self)
    overrides get_kv_connector_stats(self)
    overrides build_connector_worker_meta(self)
    overrides classmethod build_kv_connector_stats(cls, data)
    overrides classmethod build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues)
    calls _get_connector_metadata(self)
    has _vllm_config _kv_cache_config role
vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA -- without it our spec would be dropped
    subclassed
    overrides request_finished_all_groups(self, request, block_ids)
vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorMetadata -- InfLLMConnectorMetadata
    subclassed
vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole -- a type
vllm.v1.core.kv_cache_manager:KVCacheBlocks -- a type
vllm.v1.kv_cache_interface:KVCacheConfig -- which layers are ours
    has kv_cache_groups
vllm.v1.kv_cache_interface:KVCacheGroupSpec -- which layers are ours
    has layer_names kv_cache_spec
vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs -- which layers are ours
    has kv_cache_specs
vllm.forward_context:ForwardContext -- the plan is completed here
    has attn_metadata
vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin._get_kv_connector_output -- model runner V1
    says start_after_forward = not scheduler_output.has_sync_kv_loads
    does 1 x kv_connector.start_load_kv if not start_after_forward
    does kv_connector.start_load_kv, yield
    does yield, kv_connector.get_kv_connector_stats, kv_connector.build_connector_worker_meta
vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward -- model runner V2
    does 1 x self._start_load_kv if scheduler_output.has_sync_kv_loads
vllm.v1.worker.gpu.kv_connector:ActiveKVConnector._build_load_kwargs -- V2 says whose row is whose
    says request_ids=input_batch.req_ids
    says load_kwargs['attn_metadata'] = attn_metadata
vllm.v1.worker.gpu.kv_connector:ActiveKVConnector._start_load_kv -- model runner V2
    says self.kv_connector.start_load_kv(get_forward_context(), **load_kwargs)
vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model -- V2: the connector between metadata and model
    does self.model_state.prepare_attn, self.kv_connector.pre_forward, self.model

# metrics: memory/stats.py

vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats -- InfLLMStats
    subclassed
    overrides reset(self)
    overrides is_empty(self)
    overrides aggregate(self, other)
    overrides reduce(self)
    has data
vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics -- InfLLMPromMetrics
    subclassed
    overrides __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues)
    overrides observe(self, transfer_stats_data, engine_idx)
    has _gauge_cls _counter_cls _labelnames per_engine_labelvalues
vllm.v1.metrics.utils:create_metric_per_engine -- one series for each engine
    calls create_metric_per_engine(metric, per_engine_labelvalues)
vllm.v1.core.sched.scheduler:Scheduler.update_from_output -- asks the connector, and adds what the worker counted
    does self.connector.get_kv_connector_stats, kv_connector_stats.aggregate, self.make_stats
vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorLogging.log -- the line in the log
    does self.transfer_stats_accumulator.reduce

# traces: memory/connector.py, memory/trace.py; requests are checked in plugin.py

vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorWorkerMetadata -- InfLLMWorkerMetadata
    subclassed
    overrides aggregate(self, other)
vllm.v1.outputs:KVConnectorOutput -- what the worker sent
    has kv_connector_worker_meta
vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.post_forward -- model runner V2
    does self.kv_connector.get_kv_connector_stats, self.kv_connector.build_connector_worker_meta
vllm.v1.core.sched.scheduler:Scheduler.update_from_output -- traces of requests that end are asked for and returned
    does self._free_request, EngineCoreOutput
    says kv_transfer_params=kv_transfer_params
vllm.v1.core.sched.scheduler:Scheduler._connector_finished -- all groups at once
    does self.connector.request_finished_all_groups
vllm.v1.engine.output_processor:RequestState._new_request_output -- a trace reaches the answer
    says kv_transfer_params=kv_transfer_params
vllm.platforms.interface:Platform -- requests with a mistyped argument are refused
    overrides classmethod validate_request(cls, processed_inputs, params)
vllm.v1.engine.input_processor:InputProcessor.process_inputs -- the platform may refuse a request
    does current_platform.validate_request
vllm.exceptions:VLLMValidationError -- the one that becomes HTTP 400
    calls VLLMValidationError(message)
vllm.sampling_params:SamplingParams -- the argument
    has extra_args n

# stopping a server: stopping.py

vllm.v1.engine.async_llm:AsyncLLM -- its shutdown tells clients
    overrides shutdown(self, timeout)
    has vllm_config output_handler output_processor
vllm.v1.engine.async_llm:AsyncLLM.shutdown -- what is left is over before clients are told
    does engine_core.shutdown, cancel_task_threadsafe
vllm.v1.engine.output_processor:OutputProcessor -- whom to tell
    calls get_num_unfinished_requests(self)
    calls propagate_error(self, e)
    overrides propagate_error(self, e)
vllm.v1.engine.async_llm:AsyncLLM._run_output_handler -- the end of an engine core that it notices
    says output_processor.propagate_error(e)
vllm.v1.engine.exceptions:EngineDeadError -- what it would say then
    calls EngineDeadError()
vllm.exceptions:GracefulHTTPError -- the one that becomes an HTTP status
    calls GracefulHTTPError(message, http_status)
vllm.v1.engine.utils:CoreEngineProcManager.__init__ -- by its name a worker knows an engine core
    says name=f'EngineCore_DP{global_index}' if is_dp else 'EngineCore'
vllm.v1.executor.multiproc_executor:WorkerProc.make_worker_process -- by its name a worker knows itself
    says name=f'VllmWorker-{rank}'
vllm.entrypoints.launchers.launcher:serve_http -- engine first, clients then; handlers that replace ours
    says loop.add_signal_handler(signal.SIGINT, signal_handler)
    says loop.add_signal_handler(signal.SIGTERM, signal_handler)
    says partial(engine_client.shutdown, timeout=timeout)
vllm.entrypoints.launchers.api_server.entry:run_server -- the handler that ours replaces during startup
    says signal.signal(signal.SIGTERM, _interrupt_init)

# the worker: worker/

vllm.v1.worker.gpu_worker:Worker -- InfLLMGPUWorker
    subclassed
    overrides load_model(self, *, load_dummy_weights)
    overrides execute_model(self, scheduler_output)
    overrides get_kv_cache_spec(self)
    overrides determine_available_memory(self)
    has vllm_config model_runner
vllm.v1.worker.cpu_worker:CPUWorker -- InfLLMCPUWorker
    subclassed
    overrides __init__(self, vllm_config, ...)
    overrides load_model(self, *, load_dummy_weights)
    overrides execute_model(self, scheduler_output)
    overrides get_kv_cache_spec(self)
    overrides sample_tokens(self, ...)
    has vllm_config model_runner
vllm.v1.worker.gpu_model_runner:GPUModelRunner -- worker/cpu.py: whose prompt is not complete, and its generators
    has input_batch discard_request_mask
vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync -- worker/cpu.py: what a CPU's generator cannot do
    says gen.set_offset(gen.get_offset() - 4)
vllm.v1.worker.gpu_input_batch:InputBatch -- worker/cpu.py: generators by the request's place in the batch
    has generators
vllm.benchmarks.serve:add_cli_args -- benchmarks/load.py: `vllm bench serve` in this process
    calls add_cli_args(parser)
vllm.benchmarks.serve:main_async -- benchmarks/load.py: what it measured
    says get_samples(args, tokenizer)
    says result_json = {**result_json, **benchmark_result}
vllm.benchmarks.serve:benchmark -- benchmarks/load.py: answers, errors and times of each request
    says 'generated_texts'
    says 'errors'
    says 'start_times'
    says 'latencies'
vllm.utils.cpu_resource_utils:get_memory_node_info -- worker/cpu.py: the memory that the plan divides
    calls get_memory_node_info(node_id)
vllm.utils.cpu_resource_utils:MemoryNodeInfo -- worker/cpu.py
    has total_memory available_memory
vllm.utils.cpu_resource_utils:get_allowed_cpu_list -- worker/cpu.py: the first core tells the memory node
vllm.utils.cpu_resource_utils:LogicalCPUInfo -- worker/cpu.py
    has numa_node
vllm.v1.engine.core:EngineCore._initialize_kv_caches -- specs, with which the plan is made, before memory
    does self.model_executor.get_kv_cache_specs, self.model_executor.determine_available_memory
vllm.v1.worker.gpu_model_runner:GPUModelRunner -- V1
    calls get_model(self)
vllm.v1.worker.gpu.model_runner:GPUModelRunner -- V2
    calls get_model(self)
vllm.model_executor.layers.attention.attention:Attention -- is this layer ours
    has impl

# attention: attention/

vllm.v1.attention.backend:AttentionBackend -- InfLLMBackend
    subclassed
    overrides staticmethod get_name()
    overrides staticmethod get_impl_cls()
    overrides staticmethod get_builder_cls()
    overrides staticmethod get_supported_kernel_block_sizes(kv_cache_spec)
    overrides classmethod supported_kv_cache_layouts(cls)
    has forward_includes_kv_cache_update supported_dtypes supported_kv_cache_dtypes
vllm.v1.attention.backend:MultipleOf -- any block size
    calls MultipleOf(base)
vllm.v1.kv_cache_interface:KVCacheLayout -- our packing
    has LBHNC
vllm.v1.attention.backend:AttentionImpl -- InfLLMImpl
    subclassed
    overrides __init__(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap, attn_type, kv_sharing_target_layer_name)
    overrides forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
        output_block_scale)
    has num_heads head_size scale kv_cache_dtype
vllm.v1.attention.backend:AttentionMetadata -- InfLLMMetadata
    subclassed
vllm.v1.attention.backend:AttentionMetadataBuilder -- InfLLMMetadataBuilder
    subclassed
    overrides __init__(self, kv_cache_spec, layer_names, vllm_config, device)
    overrides build(self, common_prefix_len, common_attn_metadata, fast_build)
    overrides build_for_cudagraph_capture(self, common_attn_metadata)
    overrides classmethod get_cudagraph_support(cls, vllm_config, kv_cache_spec)
vllm.v1.attention.backend:AttentionCGSupport -- CUDA graphs: decode steps of the Triton operations, nothing else
    has UNIFORM_SINGLE_TOKEN_DECODE NEVER
vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model -- the step is planned before a graph of it runs
    says self.kv_connector.pre_forward(scheduler_output, input_batch, attn_metadata=attn_metadata)
    does self.kv_connector.pre_forward, self.cudagraph_manager.run_fullgraph
vllm.v1.worker.gpu.kv_connector:ActiveKVConnector._build_load_kwargs -- the plan of such a step
    says request_ids=input_batch.req_ids
    says load_kwargs['attn_metadata'] = attn_metadata
vllm.v1.attention.backend:CommonAttentionMetadata -- the rows of the batch
    has query_start_loc_cpu seq_lens_cpu_upper_bound block_table_tensor num_reqs slot_mapping

# rotary tables: attention/rope.py, worker/base.py; the last four by class name

vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase -- tables are found and extended
    calls _compute_inv_freq(self, base)
    has cos_sin_cache is_neox_style base
vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding -- default
vllm.model_executor.layers.rotary_embedding.llama3_rope:Llama3RotaryEmbedding -- llama3
    calls _compute_inv_freq(self, base)
vllm.model_executor.layers.rotary_embedding.linear_scaling_rope:LinearScalingRotaryEmbedding -- linear
    calls _compute_inv_freq(self, base)
    has scaling_factors
vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope:YaRNScalingRotaryEmbedding -- YaRN
    calls _compute_inv_freq(self, scaling_factor)
    has scaling_factor mscale

# a model without an engine: tools/blueprint.py

vllm.config:set_current_vllm_config -- models are built under it
    calls set_current_vllm_config(vllm_config)
vllm.distributed.parallel_state:init_distributed_environment -- models are built inside a group of processes
    calls init_distributed_environment(world_size, rank, distributed_init_method, local_rank, backend)
vllm.distributed.parallel_state:ensure_model_parallel_initialized -- the same
    calls ensure_model_parallel_initialized(tensor_model_parallel_size, pipeline_model_parallel_size)
vllm.distributed.parallel_state:cleanup_dist_env_and_memory -- and the end of it
    calls cleanup_dist_env_and_memory()
vllm.model_executor.model_loader.utils:initialize_model -- without weights
    calls initialize_model(vllm_config)
vllm.utils.torch_utils:set_default_torch_dtype -- of its parameters
    calls set_default_torch_dtype(dtype)
vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec -- of its layers, as a worker has them
    calls get_kv_cache_spec(vllm_config)
vllm.platforms.interface:Platform -- as an executor does once the model is built
    calls classmethod update_block_size_for_backend(cls, vllm_config)
vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase -- tables are computed, not loaded
    calls _compute_cos_sin_cache(self)
vllm.config:ModelConfig -- tools/doctor.py, tools/tune.py
    has dtype
    calls get_hidden_size(self)

# vllm-infllm bench: tools/server.py, tools/bench_run.py, tools/bench_report.py

vllm.entrypoints.cli.main:main -- vLLM's command, run by its module
    calls main()
vllm.benchmarks.serve:add_cli_args -- vllm bench serve
    says '--base-url'
    says '--max-concurrency'
    says '--input-len'
    says '--output-len'
    says '--ignore-eos'
    says '--temperature'
    says '--ready-check-timeout-sec'
    says '--disable-tqdm'
    says '--save-result'
    says '--save-detailed'
    says '--result-dir'
    says '--result-filename'
vllm.benchmarks.serve:benchmark -- its JSON
    says 'completed'
    says 'total_token_throughput'
    says 'total_input_tokens'
    says 'total_output_tokens'
    says 'errors'
vllm.benchmarks.throughput:add_cli_args -- vllm bench throughput
    says '--input-len'
    says '--output-len'
    says '--num-prompts'
    says '--num-warmups'
    says '--output-json'
vllm.benchmarks.throughput:main -- its JSON
    says 'tokens_per_second'
vllm.benchmarks.latency:add_cli_args -- vllm bench latency
    says '--input-len'
    says '--output-len'
    says '--batch-size'
    says '--num-iters-warmup'
    says '--num-iters'
    says '--output-json'
vllm.benchmarks.latency:main -- its JSON
    says 'latencies'
vllm.v1.metrics.loggers:PrometheusStatLogger -- how many blocks there are
    says 'vllm:cache_config_info'

# the demo and the evaluation: tools/demo_worker.py, tools/eval/worker.py

vllm:LLM -- the engine
    calls LLM(model=, max_model_len=, max_num_seqs=, max_num_batched_tokens=, block_size=, enable_prefix_caching=,
        enforce_eager=, kv_cache_memory_bytes=, attention_backend=, additional_config=, disable_log_stats=)
    calls enqueue(self, prompts, sampling_params, use_tqdm=)
    calls get_metrics(self)
    has llm_engine
vllm.v1.engine.llm_engine:LLMEngine -- step by step
    calls add_request(self, request_id, prompt, params)
    calls has_unfinished_requests(self)
    calls step(self)
    has vllm_config
vllm.outputs:RequestOutput -- answers
    has request_id outputs prompt_logprobs finished metrics
vllm.v1.metrics.stats:RequestStateStats -- time to the first token
    has first_token_latency
vllm:SamplingParams -- greedy
    calls SamplingParams(temperature=, max_tokens=, prompt_logprobs=, output_kind=)
vllm.sampling_params:RequestOutputKind -- an output when the answer is complete
    has FINAL_ONLY
vllm.v1.metrics.loggers:PrometheusStatLogger -- the peak of KV blocks
    says 'vllm:kv_cache_usage_perc'
"""


@dataclass(frozen=True)
class Entry:
    """One name of vLLM that the plugin touches, and what it needs of it."""

    name: str
    """module:Name or module:Class.method."""
    why: str
    needs: tuple[tuple[str, str], ...]
    """(what we do with it, the rest of the line)."""

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]

    @property
    def path(self) -> list[str]:
        """The name in the module, then that of the method if the entry is about one."""
        return self.name.partition(":")[2].split(".")

    def given(self, need: str) -> list[str]:
        return [text for name, text in self.needs if name == need]

    @property
    def overrides(self) -> list[str]:
        """Names of the methods that ours replace."""
        return [parse_signature(text)[0] for text in self.given("overrides")]

    @property
    def since(self) -> tuple[int, ...]:
        return tuple(int(part) for text in self.given("since") for part in text.split("."))


def parse_contract(text: str) -> tuple[Entry, ...]:
    """The entries of a contract written as above."""
    entries: list[Entry] = []
    for line in re.sub(r"\n {8}", " ", text).splitlines():
        if line.startswith("    "):
            need, _, rest = line.strip().partition(" ")
            entries[-1] = replace(entries[-1], needs=(*entries[-1].needs, (need, rest)))
        elif line and not line.startswith("#"):
            name, _, why = line.partition(" -- ")
            entries.append(Entry(name, why, ()))
    return tuple(entries)


# ---- reading sources ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """vLLM's Python sources in one version."""

    version: str
    read: Callable[[str], str | None]
    """The text of a file such as vllm/config/model.py; None if there is none."""
    paths: Callable[[], Iterable[str]] = tuple
    """All files, to look for what has moved."""

    @property
    def minor(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")[:2]))


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    """positional, keyword, * or **."""
    required: bool = False

    def __str__(self) -> str:
        return f"{self.kind}{self.name}" if "*" in self.kind else self.name


@dataclass(frozen=True)
class Signature:
    kind: str
    """method, classmethod, staticmethod, property or function."""
    parameters: tuple[Parameter, ...] = ()

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.parameters]

    def of_kind(self, *kinds: str) -> list[Parameter]:
        return [p for p in self.parameters if p.kind in kinds]

    def written(self) -> list[str]:
        """The parameters as they are written, with the `*` before those that only have names."""
        names = [str(p) for p in self.parameters]
        first = next((i for i, p in enumerate(self.parameters) if p.kind == "keyword"), None)
        return names if first is None or self.of_kind("*") else [*names[:first], "*", *names[first:]]

    def __str__(self) -> str:
        prefix = "" if self.kind in ("method", "function") else f"{self.kind} "
        return f"{prefix}({', '.join(self.written())})"


@dataclass(frozen=True)
class Member:
    """An attribute of a class: with a signature if it is a method or property."""

    signature: Signature | None = None
    abstract: bool = False


@dataclass(frozen=True)
class Place:
    """A definition in the sources."""

    index: "Index"
    module: str
    node: ast.AST


@dataclass(frozen=True)
class _Import:
    module: str
    name: str | None


class Index:
    """Looks names up in the sources of one version, through imports and base classes."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.path = cache(self._path)
        self.names = cache(self._names)
        self.members = cache(self._members)

    def _path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((p for p in (f"{base}.py", f"{base}/__init__.py") if self.sources.read(p) is not None), None)

    def _names(self, module: str) -> dict[str, "ast.AST | _Import"]:
        """What a module defines at its top level, `if` and `try` included; the first definition counts."""
        path = self.path(module)
        if path is None:
            return {}
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        names: dict[str, ast.AST | _Import] = {}
        for node in _statements(ast.parse(self.sources.read(path) or "").body):
            if isinstance(node, ast.ImportFrom):
                parent = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                origin = ".".join([*parent, *([node.module] if node.module else [])])
                names.update({a.asname or a.name: _Import(origin, a.name) for a in node.names} | names)
            elif isinstance(node, ast.Import):
                names.update({a.asname: _Import(a.name, None) for a in node.names if a.asname} | names)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.setdefault(node.name, node)
            else:
                for name in _assigned(node):
                    names.setdefault(name, node)
        return names

    def find(self, module: str, name: str) -> Place | None:
        """The definition of a name, where it really is."""
        node = self.names(module).get(name)
        if isinstance(node, _Import):
            if node.name is None or self.path(f"{node.module}.{node.name}"):
                return None
            return self.find(node.module, node.name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id != name:
            return self.find(module, node.value.id) or Place(self, module, node)
        return Place(self, module, node) if node is not None else None

    def bases(self, place: Place) -> list[Place]:
        """The class and its base classes that are vLLM's, nearest first."""
        assert isinstance(place.node, ast.ClassDef)
        found = [place]
        for base in place.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                origin = self.find(place.module, base.id)
            elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
                imported = self.names(place.module).get(base.value.id)
                origin = self.find(imported.module, base.attr) if isinstance(imported, _Import) else None
            else:
                origin = None
            if origin is not None and isinstance(origin.node, ast.ClassDef):
                found += [b for b in self.bases(origin) if b not in found]
        return found

    def member(self, place: Place, name: str) -> Member | None:
        return next((m[name] for b in self.bases(place) if name in (m := self.members(b))), None)

    def constructor(self, place: Place) -> Signature:
        """Of a class: its __init__, or the one that its fields make."""
        init = self.member(place, "__init__")
        if init is not None and init.signature is not None:
            return init.signature
        fields: dict[str, Parameter] = {}
        for base in reversed(self.bases(place)):
            assert isinstance(base.node, ast.ClassDef)
            for node in base.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_field(node):
                    name = node.target.id
                    fields[name] = Parameter(name, "positional", not _has_default(node.value))
        return Signature("method", (Parameter("self", "positional"), *fields.values()))

    def _members(self, place: Place) -> dict[str, Member]:
        assert isinstance(place.node, ast.ClassDef)
        members: dict[str, Member] = {}
        variables: set[str] = set()
        for node in _statements(place.node.body):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                variables.update(_assigned(node))
                continue
            decorators = [ast.unparse(d) for d in node.decorator_list]
            variables.update(_set_on(node))
            if not any(d.endswith((".setter", ".deleter")) for d in decorators):
                abstract = any(d.endswith("abstractmethod") for d in decorators)
                members[node.name] = Member(signature(node), abstract)
        return {name: Member() for name in variables} | members

    def method(self, place: Place, name: str) -> Place | None:
        """The code of a method."""
        for base in self.bases(place) if isinstance(place.node, ast.ClassDef) else []:
            assert isinstance(base.node, ast.ClassDef)
            for node in _statements(base.node.body):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return Place(self, base.module, node)
        return None

    def defined_in(self, name: str) -> list[str]:
        """Files whose top level defines a name."""
        pattern = re.compile(rf"^(?:(?:class|def|async def) {re.escape(name)}\b|{re.escape(name)}\s*[:=])", re.M)
        return [p for p in self.sources.paths() if pattern.search(self.sources.read(p) or "")]


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            handlers = [h.body for h in getattr(node, "handlers", [])]
            parts = [node.body, getattr(node, "orelse", []), *handlers, getattr(node, "finalbody", [])]
            for part in parts:
                yield from _statements(part)


def _assigned(node: ast.AST) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _set_on(method: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Attributes that a method sets on its first parameter, buffers of a torch module included."""
    if not method.args.args:
        return set()
    owner = method.args.args[0].arg
    names = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == owner:
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{owner}.register_buffer" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.add(first.value)
    return names


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str = "method") -> Signature:
    for decorator in map(ast.unparse, node.decorator_list):
        if decorator in ("classmethod", "staticmethod", "property"):
            kind = decorator
        elif decorator.endswith("cached_property"):
            kind = "property"
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    parameters = [Parameter(a.arg, "positional", i < required) for i, a in enumerate(positional)]
    if args.vararg:
        parameters.append(Parameter(args.vararg.arg, "*"))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(Parameter(arg.arg, "keyword", default is None))
    if args.kwarg:
        parameters.append(Parameter(args.kwarg.arg, "**"))
    return Signature(kind, tuple(parameters))


def _is_field(node: ast.AnnAssign) -> bool:
    annotation = ast.unparse(node.annotation)
    value = node.value
    no_init = isinstance(value, ast.Call) and any(
        k.arg == "init" and ast.unparse(k.value) == "False" for k in value.keywords
    )
    return "ClassVar" not in annotation and not no_init


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func).lower().rpartition(".")[2] == "field":
        return bool(value.args) or any(k.arg in ("default", "default_factory") for k in value.keywords)
    return value is not None


# ---- comparing ----------------------------------------------------------------------------------------------------


def differences(sources: Sources, contract: Iterable[Entry] | None = None) -> list[str]:
    """All that differs from the contract, one line each: version, file, what is expected and what is there."""
    index = Index(sources)
    entries = CONTRACT if contract is None else contract
    return [line for entry in entries if entry.since <= sources.minor for line in _Check(index, entry).run()]


class _Check:
    """One entry against one version."""

    def __init__(self, index: Index, entry: Entry) -> None:
        self.index = index
        self.entry = entry
        self.name, *self.method = entry.path
        self.lines: list[str] = []

    def run(self) -> list[str]:
        path = self.index.path(self.entry.module)
        place = self.index.find(self.entry.module, self.name)
        if place is None:
            files = self.index.defined_in(self.name)
            where = f"but it is in {' and '.join(files)}" if files else "nor in any other file"
            self.differs(self.name, f"none, {where}" if path else f"no such file, {where}")
            return self.lines
        self.place = place
        if self.method:
            body = self.index.method(place, self.method[0])
            if body is None:
                self.differs(".".join(self.entry.path), "none")
                return self.lines
            self.place = body
        for need, text in self.entry.needs:
            getattr(self, f"_{need}")(text)
        return self.lines

    def differs(self, expected: str, found: object) -> None:
        path = self.index.path(self.entry.module) or self.entry.module.replace(".", "/") + ".py"
        start = f"vllm {self.index.sources.version} {path}"
        self.lines.append(f"{start}: {expected} expected, found {found} [{self.entry.why}]")

    # -- names and signatures

    def _since(self, text: str) -> None:
        pass

    def _subclassed(self, text: str) -> None:
        for name in {n: None for base in self.index.bases(self.place) for n in self.index.members(base)}:
            member = self.index.member(self.place, name)
            if member is not None and member.abstract and name not in self.entry.overrides:
                self.differs(f"no abstract method of {self.name} that we do not override", f"{name}{member.signature}")

    def _overrides(self, text: str) -> None:
        name, expected, rest = parse_signature(text)
        found = self._found(name)
        wanted, given = expected.written(), found.written() if found else []
        same = given[: len(wanted)] == wanted if rest else given == wanted
        if found is None or found.kind != expected.kind or not same:
            self._signature_differs(text, name, found)

    def _calls(self, text: str) -> None:
        name, expected, _ = parse_signature(text)
        found = self._found(name)
        if found is None:
            self._signature_differs(text, name, found)
            return
        by_position = [p.name for p in expected.of_kind("positional")]
        if name == self.name and isinstance(self.place.node, ast.ClassDef):
            by_position = ["self", *by_position]
        by_name = [p.name for p in expected.of_kind("keyword")]
        positional = [p.name for p in found.of_kind("positional")]
        accepted = [p.name for p in found.of_kind("positional", "keyword")]
        fits = positional[: len(by_position)] == by_position or bool(found.of_kind("*"))
        known = bool(found.of_kind("**")) or all(n in accepted for n in by_name)
        needed = [p.name for p in found.parameters if p.required and p.name not in (*by_position, *by_name)]
        kinds = ("function", "method") if expected.kind == "method" else (expected.kind,)
        if not (fits and known and not needed and found.kind in kinds):
            self._signature_differs(f"the call {text}", name, found)

    def _found(self, name: str) -> Signature | None:
        """The signature of a method, of the class's constructor, or of the function itself."""
        if not isinstance(self.place.node, ast.ClassDef):
            return signature(self.place.node, "function") if isinstance(self.place.node, ast.FunctionDef) else None
        if name == self.name:
            return self.index.constructor(self.place)
        member = self.index.member(self.place, name)
        return member.signature if member else None

    def _signature_differs(self, text: str, name: str, found: Signature | None) -> None:
        full = text if name == self.name else re.sub(rf"\b{name}\b", f"{self.name}.{name}", text, count=1)
        self.differs(full, "none" if found is None else found)

    def _has(self, text: str) -> None:
        for name in text.split():
            member = self.index.member(self.place, name) if isinstance(self.place.node, ast.ClassDef) else None
            if member is None:
                self.differs(f"attribute {self.name}.{name}", "none")
            elif member.signature is not None and member.signature.kind != "property":
                self.differs(f"attribute {self.name}.{name}", f"a method {member.signature}")

    # -- what the code does

    def _does(self, text: str) -> None:
        guarded = re.fullmatch(r"(\d+) x (\S+) if (.+)", text)
        if guarded:
            times, name, condition = guarded.groups()
            branches = [
                n for n in ast.walk(self.place.node) if isinstance(n, ast.If) and ast.unparse(n.test) == condition
            ]
            count = sum(_calls_in(statement).count(name) for branch in branches for statement in branch.body)
            if count != int(times):
                self._code_differs(f"{times} calls of {name} if {condition}", count)
            return
        names = text.split(", ")
        calls = [name for name in _calls_in(self.place.node) if name in names]
        remaining = iter(calls)
        if not all(name in remaining for name in names):
            self._code_differs(f"calls of {', then '.join(names)}", ", ".join(calls) or "none of them")

    def _says(self, text: str) -> None:
        if text not in ast.unparse(self.place.node):
            self._code_differs(f"`{text}`", "nothing of the kind")

    def _takes(self, text: str) -> None:
        fields = self.index.find(*text.split(":"))
        assert fields is not None and isinstance(self.place.node, ast.FunctionDef)
        parameters = signature(self.place.node).names
        missing = [n for n in self.index.constructor(fields).names if n not in ("self", *parameters)]
        if missing:
            self._code_differs(f"a parameter for each field of {fields.node.name}", f"none for {', '.join(missing)}")

    def _code_differs(self, expected: str, found: object) -> None:
        self.differs(f"in {'.'.join(self.entry.path)}: {expected}", found)


def parse_signature(written: str) -> tuple[str, Signature, bool]:
    """Name and signature of an entry, and whether it ends with `...`."""
    before, _, arguments = written.partition("(")
    *kinds, name = before.split()
    parameters, rest, named = [Parameter("self", "positional")] if kinds == ["property"] else [], False, False
    for argument in filter(None, arguments.removesuffix(")").split(", ")):
        if argument == "...":
            rest = True
        elif argument == "*":
            named = True
        elif argument.startswith("*"):
            name_only = argument.lstrip("*")
            parameters.append(Parameter(name_only, argument.removesuffix(name_only)))
        else:
            kind = "keyword" if named or argument.endswith("=") else "positional"
            parameters.append(Parameter(argument.removesuffix("="), kind))
    return name, Signature(kinds[0] if kinds else "method", tuple(parameters)), rest


def _calls_in(node: ast.AST) -> list[str]:
    """What code calls, in the order of the source; a `yield` counts as a call of that name."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Call | ast.Yield)]
    found.sort(key=lambda n: (n.lineno, n.col_offset))
    return [ast.unparse(n.func) if isinstance(n, ast.Call) else "yield" for n in found]


CONTRACT = parse_contract(_CONTRACT)
