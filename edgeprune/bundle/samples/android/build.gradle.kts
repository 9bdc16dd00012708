// What your app module's build.gradle.kts needs. Not compiled here: this fragment was written without an Android toolchain.
android {
    defaultConfig {
        minSdk = 23
        ndk { abiFilters += "arm64-v8a" } // the bundle was made for 64-bit Arm
    }
    androidResources { noCompress += "pte" } // compressed assets would be unpacked on every start
}

dependencies {
    // Take the release that README.md names under "runtime" or a newer one: a program may need a runtime as new as its exporter.
    implementation("org.pytorch:executorch-android:RELEASE")
}
