# shellcheck shell=bash
# Two S3 stores with Object Lock in the world's namespace: versitygw and SeaweedFS. Each has a root identity, and a lesser one for
# the gateway that may write and read but neither delete nor shorten. Credentials end up in $RUN/s3.env. versitygw has a second
# bucket, without locks, for the arguments that undo calls.

S3_BUCKET=belay-evidence S3_STATE_BUCKET=belay-state S3_REGION=us-east-1
# All that the gateway may do with a bucket, on either store.
gateway_rights() {
  echo '"Effect": "Allow",
  "Action": ["s3:PutObject", "s3:PutObjectRetention", "s3:GetObject", "s3:GetObjectVersion", "s3:GetObjectRetention", "s3:ListBucket", "s3:ListBucketVersions"],
  "Resource": ["arn:aws:s3:::'"$1"'", "arn:aws:s3:::'"$1"'/*"]'
}

configure_s3() {
  cd "$RUN" || return
  [ ! -e s3.env ] || return 0
  secret() { openssl rand -hex 20; }
  cat > s3.env.tmp <<Y
S3_BUCKET=$S3_BUCKET
S3_STATE_BUCKET=$S3_STATE_BUCKET
S3_REGION=$S3_REGION
S3_ENDPOINT=http://$VERSITYGW_IP:7070
S3_ACCESS_KEY=belay-gateway
S3_SECRET_KEY=$(secret)
S3_ROOT_ACCESS_KEY=belay-root
S3_ROOT_SECRET_KEY=$(secret)
SEAWEED_ENDPOINT=http://$SEAWEED_IP:8333
SEAWEED_ACCESS_KEY=belay-gateway
SEAWEED_SECRET_KEY=$(secret)
SEAWEED_ROOT_ACCESS_KEY=belay-root
SEAWEED_ROOT_SECRET_KEY=$(secret)
Y
  # shellcheck source=/dev/null
  source ./s3.env.tmp
  mkdir -p versitygw/{iam,data,versions} seaweedfs
  # versitygw takes it as the bucket's policy; SeaweedFS as a policy document, in a string, that the identity names.
  local bucket
  for bucket in "$S3_BUCKET" "$S3_STATE_BUCKET"; do
    echo "{\"Statement\": [{\"Principal\": [\"$S3_ACCESS_KEY\"], $(gateway_rights "$bucket")}]}" > "versitygw/policy-$bucket.json"
  done
  local document
  document="{\"Version\": \"2012-10-17\", \"Statement\": [{$(gateway_rights "$S3_BUCKET")}]}"
  document=${document//$'\n'/}
  cat > seaweedfs/identities.json <<Y
{"identities": [
  {"name": "root", "credentials": [{"accessKey": "$SEAWEED_ROOT_ACCESS_KEY", "secretKey": "$SEAWEED_ROOT_SECRET_KEY"}], "actions": ["Admin"]},
  {"name": "gateway", "credentials": [{"accessKey": "$SEAWEED_ACCESS_KEY", "secretKey": "$SEAWEED_SECRET_KEY"}], "policyNames": ["evidence"]}],
 "policies": [{"name": "evidence", "content": "${document//\"/\\\"}"}]}
Y
  mv s3.env.tmp s3.env
}

start_s3() {
  # shellcheck source=/dev/null
  source "$RUN/s3.env"
  ROOT_ACCESS_KEY=$S3_ROOT_ACCESS_KEY ROOT_SECRET_KEY=$S3_ROOT_SECRET_KEY start versitygw "$WORLD" \
    "$BIN/versitygw" --port "$VERSITYGW_IP:7070" --region "$S3_REGION" --iam-dir "$RUN/versitygw/iam" --quiet \
    posix --versioning-dir "$RUN/versitygw/versions" "$RUN/versitygw/data"
  start seaweedfs "$WORLD" "$BIN/weed" -logtostderr=true server -dir="$RUN/seaweedfs" -ip="$SEAWEED_IP" -ip.bind="$SEAWEED_IP" \
    -master.volumeSizeLimitMB=256 -volume.max=500 -filer -s3 -s3.port=8333 -s3.config="$RUN/seaweedfs/identities.json"
}

# s3 ENDPOINT ACCESS SECRET METHOD PATH BODY [CURL OPTION…]: one signed request. Debian 12's curl signs, but leaves the hash of the
# body to us.
s3() {
  local endpoint=$1 access=$2 secret=$3 method=$4 path=$5 body=$6; shift 6
  inside "$WORLD" curl -sS --fail-with-body -m 10 -K <(echo "user = $access:$secret") --aws-sigv4 "aws:amz:$S3_REGION:s3" \
    -H "x-amz-content-sha256: $(printf %s "$body" | sha256sum | cut -d' ' -f1)" -X "$method" ${body:+--data-binary "$body"} "$@" "$endpoint/$path"
}

# As root, on the store NAME.
s3_root() {
  local name=$1; shift
  case $name in
    versitygw) s3 "$S3_ENDPOINT" "$S3_ROOT_ACCESS_KEY" "$S3_ROOT_SECRET_KEY" "$@" ;;
    seaweedfs) s3 "$SEAWEED_ENDPOINT" "$SEAWEED_ROOT_ACCESS_KEY" "$SEAWEED_ROOT_SECRET_KEY" "$@" ;;
  esac
}

# make_bucket NAME BUCKET [CURL OPTION…]: waits for the store NAME and makes a bucket there.
make_bucket() {
  local name=$1 bucket=$2; shift 2
  await "$name" 40 s3_root "$name" GET '' ''
  s3_root "$name" GET "$bucket" '' >/dev/null 2>&1 && return
  s3_root "$name" PUT "$bucket" '' "$@" >> "$LOGS/$name.log" 2>&1 || fail "$name" "refused to make the bucket $bucket"
}

finish_s3() {
  local admin=(inside "$WORLD" env ADMIN_ACCESS_KEY="$S3_ROOT_ACCESS_KEY" ADMIN_SECRET_KEY="$S3_ROOT_SECRET_KEY"
    ADMIN_ENDPOINT_URL="$S3_ENDPOINT" ADMIN_REGION="$S3_REGION" "$BIN/versitygw" admin)
  local bucket lock=(-H 'x-amz-bucket-object-lock-enabled: true')
  make_bucket versitygw "$S3_BUCKET" "${lock[@]}"
  make_bucket versitygw "$S3_STATE_BUCKET"
  # The whole list, and then a look: a pipe that is left early looks like a failure.
  local users
  users=$("${admin[@]}" list-users 2>/dev/null) || users=
  if ! grep -qw "$S3_ACCESS_KEY" <<< "$users"; then
    "${admin[@]}" create-user --access "$S3_ACCESS_KEY" --secret "$S3_SECRET_KEY" --role user >> "$LOGS/versitygw.log" 2>&1 ||
      fail versitygw "refused to make the user $S3_ACCESS_KEY"
  fi
  for bucket in "$S3_BUCKET" "$S3_STATE_BUCKET"; do
    s3_root versitygw PUT "$bucket?policy=" "$(cat "$RUN/versitygw/policy-$bucket.json")" >> "$LOGS/versitygw.log" 2>&1 ||
      fail versitygw "refused the policy of the bucket $bucket"
  done
  make_bucket seaweedfs "$S3_BUCKET" "${lock[@]}"
}
