{{/* The name of everything: at most 41 letters, since KubeRay adds to it. */}}
{{- define "triptych.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "triptych" $name) -}}
{{- $name = printf "%s-triptych" $name -}}
{{- end -}}
{{- trunc 41 $name | trimSuffix "-" -}}
{{- end -}}

{{- define "triptych.selector" -}}
app.kubernetes.io/name: triptych
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "triptych.labels" -}}
{{ include "triptych.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "triptych.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion .Values.image.flavour) -}}
{{- printf "%s%s%s" .Values.image.repository (ternary "@" ":" (hasPrefix "sha256:" $tag)) $tag -}}
{{- end -}}

{{- define "triptych.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "triptych.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The service of KubeRay by all its names, the hosts of the Ingress, and those that the args name themselves. */}}
{{- define "triptych.allowedHosts" -}}
{{- $service := printf "%s-serve-svc" (include "triptych.name" .) -}}
{{- $namespaced := printf "%s.%s" $service .Release.Namespace -}}
{{- $hosts := list $service $namespaced (printf "%s.svc" $namespaced) (printf "%s.svc.cluster.local" $namespaced) -}}
{{- if .Values.ingress.enabled -}}{{- $hosts = concat $hosts .Values.ingress.hosts -}}{{- end -}}
{{- concat $hosts (.Values.serve.args.allowed_hosts | default list) | uniq | toJson -}}
{{- end -}}

{{- define "triptych.serveConfig" -}}
{{- $deployments := list -}}
{{- range $name, $options := .Values.serve.deployments -}}
{{- $deployments = append $deployments (merge (dict "name" $name) ($options | default dict)) -}}
{{- end -}}
{{- $args := merge (dict "allowed_hosts" (include "triptych.allowedHosts" . | fromJsonArray)) .Values.serve.args -}}
{{- $application := dict
  "name" .Values.serve.application
  "route_prefix" .Values.serve.routePrefix
  "import_path" "serve_app.app:build_app"
  "runtime_env" (dict "env_vars" .Values.serve.variables)
  "args" $args
  "deployments" $deployments -}}
{{- with .Values.serve.autoscalingPolicy -}}{{- $_ := set $application "autoscaling_policy" . -}}{{- end -}}
{{- $http := merge (dict "host" "0.0.0.0") .Values.serve.httpOptions (dict "port" 8000) -}}
{{- dict "http_options" $http "applications" (list $application) | toYaml -}}
{{- end -}}

{{/* A pod of Ray. Takes root, kind (head or worker), group: its values. */}}
{{- define "triptych.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
metadata:
  labels:  # no version: another label is another cluster to KubeRay
    {{- include "triptych.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .kind }}
  {{- with .group.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "triptych.serviceAccount" $root }}
  automountServiceAccountToken: {{ and (eq .kind "head") $values.autoscaler.enabled }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .kind }}
      image: {{ include "triptych.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      ports:
        {{- if eq .kind "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: serve, containerPort: {{ dig "port" 8000 $values.serve.httpOptions }}}
        - {name: metrics, containerPort: 8080}
      env:
        - {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "serve_app.proxy:around_proxy"}
        {{- range $name, $key := $values.secrets.environment }}
        - name: {{ $name }}
          valueFrom:
            secretKeyRef: {name: {{ $values.secrets.existingSecret }}, key: {{ $key }}}
        {{- end }}
        {{- with $values.environment }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .group.resources | nindent 8 }}
      {{- with index $values.probes .kind }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: outputs, mountPath: /srv/triptych/outputs}
        - {name: state, mountPath: /var/lib/triptych}
        {{- if $values.secrets.existingSecret }}
        - {name: secrets, mountPath: /run/secrets/triptych, readOnly: true}
        {{- end }}
        {{- with $values.volumes.extraMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.volumes.tmpSize }}}
    - name: outputs
      emptyDir: {sizeLimit: 1Gi}
    - name: state
      {{- if $values.volumes.stateClaim }}
      persistentVolumeClaim: {claimName: {{ $values.volumes.stateClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.volumes.stateSize }}}
      {{- end }}
    {{- if $values.secrets.existingSecret }}
    - name: secrets
      secret: {secretName: {{ $values.secrets.existingSecret }}, defaultMode: 0440}
    {{- end }}
    {{- with $values.volumes.extra }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
